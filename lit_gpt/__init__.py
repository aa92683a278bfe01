"""A hackable toolkit to fine-tune large language models."""

from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.model.gpt import GPT

__all__ = ["GPT", "Config", "InputError", "Tokenizer"]
