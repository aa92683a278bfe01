"""A hackable toolkit to fine-tune large language models."""

import os


def choose_how_threads_wait() -> None:
    """Threads of a CPU that wait for others spin for a moment, and then sleep.

    By default they spin on, which beside other busy processes makes a token 2 to 4 times slower. If they sleep at once,
    a token in 4 bits takes half as long again on an idle machine, since between two products is less time than it takes
    to wake them: tutorials/generate_and_chat.md has the figures. OpenMP reads this when torch is loaded, and never
    again: so it is chosen here, and scripts import lit_gpt before torch. What the user says stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # of libgomp, which torch has on Linux: 0.1 ms or so


choose_how_threads_wait()

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
