"""Where a run happens: devices, precision, processes. The only file that says "cuda", "mps", "ddp" or "fsdp"."""

import sys
from contextlib import nullcontext
from typing import Any, Literal

import torch

from lit_gpt.errors import InputError

Precision = Literal["auto", "bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true"]
DType = Literal["float32", "bfloat16", "float16"]


def accelerator() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_device() -> torch.device:
    return torch.device(accelerator())


def resolve_precision(precision: Precision) -> str:
    """`auto` is bf16-true on a GPU that has it, else 32-true: bfloat16 on a CPU can be 100 times slower."""
    if precision != "auto":
        return precision
    return "bf16-true" if accelerator() == "cuda" and torch.cuda.is_bf16_supported(False) else "32-true"


def weight_dtype(precision: Precision) -> torch.dtype:
    """What the loader stores frozen weights in. Mixed precision keeps them in float32 and casts as it computes."""
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(resolve_precision(precision), torch.float32)


def trained_dtype(precision: Precision) -> torch.dtype:
    """What weights are stored in that train themselves. Raises InputError for float16, in which they cannot."""
    if weight_dtype(precision) == torch.float16:
        raise InputError(
            f"--precision {precision} is for LoRA and adapters: weights in float16 cannot be trained themselves."
            " Choose 16-mixed or bf16-true."
        )
    return weight_dtype(precision)


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What mixed precision computes in; None where nothing is cast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def inference_dtype(precision: Precision) -> torch.dtype:
    """Raises InputError for mixed precision, which is about gradients."""
    if precision.endswith("mixed"):
        raise InputError(f"--precision {precision} is for training. Here, choose bf16-true, 16-true or 32-true.")
    return weight_dtype(precision)


def as_dtype(dtype: str | None) -> torch.dtype | None:
    return None if dtype is None else getattr(torch, dtype)


def precision_plugin(precision: str, kind: str) -> Any:
    """Fabric's precision, but it casts no module: the loader has decided every tensor's dtype.

    Under bf16-true Fabric would cast float32 adapters, whose small updates would be rounded away, and the rotary
    frequencies, which would put the cosine of position 1,000 off by 0.43.
    """
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.plugins import Precision as FullPrecision

    class AsLoaded(FullPrecision):
        def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
            return module

    class Mixed(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            return data  # tokens and a Layout: integers

    class Scaled(Mixed):
        """float16 weights and float32 adapters: nothing is autocast, but the loss is scaled."""

        def forward_context(self) -> Any:
            return nullcontext()

    if precision in ("16-mixed", "bf16-mixed"):
        return Mixed(precision, kind)  # type: ignore[arg-type] # one of these two
    return Scaled("16-mixed", kind) if precision == "16-true" else AsLoaded()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this run has held so far, in GB: of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # Windows has no such module

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
