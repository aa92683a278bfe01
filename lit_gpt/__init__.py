"""A hackable toolkit to fine-tune large language models."""

import os

# Threads that wait for others sleep. By default they spin, which beside other busy processes makes a token 2 to 4 times
# slower; on an idle machine it gains 4 % (tutorials/generate_and_chat.md). OpenMP reads it when torch is loaded, and
# never again: so it is set here, and scripts import lit_gpt before torch. A value of the user's own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A GPU's memory that is free and in pieces is joined. Each step has records of other lengths, whose tensors do not fit
# into the gaps that those of before have left: an H100 kept a third more than a step took (tutorials/gpu.md). What the
# user says stays, under the variable's old name, too.
os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))

# ruff: noqa: E402
from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.model.gpt import GPT

__all__ = ["GPT", "Config", "InputError", "Tokenizer"]
