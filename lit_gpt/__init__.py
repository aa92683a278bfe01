"""A hackable toolkit to fine-tune large language models."""

from lit_gpt.config import Config
from lit_gpt.errors import InputError
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer

__all__ = ["GPT", "Config", "InputError", "Tokenizer"]
