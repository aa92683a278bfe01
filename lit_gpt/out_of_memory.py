"""Memory that does not suffice, of a GPU or of the machine: which errors say so, and what the user should know."""

import os
import re
import sys
from typing import Any

# CUDA's and HIP's allocator, MPS, NCCL and the driver say it in words, cuBLAS and cuDNN by the name of a status
ON_A_GPU = r"out of memory|STATUS_ALLOC_FAILED"
ON_THE_CPU = r"DefaultCPUAllocator: can't allocate memory: you tried to allocate (\d+) bytes"
WHAT_NEEDS_LESS = "the batch (--train.micro_batch_size) or the length (--max_seq_length, --max_new_tokens)"

# torch's units -> bytes
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def explain_memory(error: BaseException, what: str = "This command", to_lower: str = WHAT_NEEDS_LESS) -> str | None:
    """What the user should know about memory that does not suffice, and can do; None for another error.

    Args:
        error: What torch or Python raised.
        what: What does not fit, as the subject of a sentence.
        to_lower: What the user can lower, the flags included.
    """
    pages = "tutorials/out_of_memory.md says what else needs less"

    # the machine's
    asked = re.search(ON_THE_CPU, str(error))
    if isinstance(error, MemoryError) or asked is not None:
        gb = f" {int(asked[1]) / 1e9:,.2f} GB of" if asked else ""
        return f"{what} does not fit: this machine has no{gb} memory left. Lower {to_lower}; {pages}."

    # the GPU's; torch has a class for its own allocator alone, and the other libraries a text
    is_of_a_gpu = isinstance(error, RuntimeError) and re.search(ON_A_GPU, str(error), re.IGNORECASE)
    if type(error).__name__ != "OutOfMemoryError" and not is_of_a_gpu:
        return None
    return (
        f"{what} does not fit: {memory_of_gpu()}{asked_for(error)}. Lower {to_lower}; {pages}, and"
        f" scripts/plan_memory.py counts what fits.{how_to_join_pieces()}"
    )


def memory_of_gpu() -> str:
    """How large the GPU of this process is, and how much of it the process has had, for the middle of a sentence."""
    cuda = cuda_in_use()
    if cuda is None:
        return "the memory of the GPU is full"
    size = cuda.get_device_properties(cuda.current_device()).total_memory
    held = cuda.max_memory_allocated()
    reserved = cuda.max_memory_reserved()
    return (
        f"the GPU has {size / 1e9:.1f} GB, of which this process has held {held / 1e9:.1f} and reserved"
        f" {reserved / 1e9:.1f} at its peak"
    )


def how_to_join_pieces() -> str:
    """A sentence about memory that is free and in pieces; empty where torch joins them already, or cannot.

    Each step has records of other lengths, whose tensors do not fit into the gaps that those of before have left.
    """
    settings = [os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
    if cuda_in_use() is None or "expandable_segments:True" in ",".join(settings):
        return ""
    return (
        " If much more was reserved than held, the memory is in pieces: PYTORCH_ALLOC_CONF=expandable_segments:True"
        " before the command joins them."
    )


def cuda_in_use() -> Any:
    """The module torch.cuda, if this process computes with CUDA; else None."""
    # without torch it does not, and loading torch takes seconds
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def asked_for(error: BaseException) -> str:
    """How much more memory was asked for, as the end of a sentence; empty if the error does not say it."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error))
    if asked is None:
        return ""
    gb = float(asked[1]) * UNITS[asked[2]] / 1e9
    return f", and {gb:.2f} GB more were asked for"
