"""The device of a process, and the dtypes that it computes in. Processes are in lit_gpt/distributed.py; kinds of
devices have their names nowhere else.

    --precision      frozen weights     computed in      trained by an adapter
    32-true          float32            float32          float32
    bf16-true        bfloat16           bfloat16         float32
    16-true          float16            float16          float32, and the loss is scaled
    bf16-mixed       float32            bfloat16         float32
    16-mixed         float32            float16          float32, and the loss is scaled
"""

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch

from lit_gpt.errors import InputError
from lit_gpt.nvidia_driver import explain_unseen_card

Precision = Literal["auto", "bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true"]
DType = Literal["float32", "bfloat16", "float16"]


def accelerator() -> str:
    """The kind of device that this machine has, as torch and Fabric call it: the first of CUDA, MPS and the CPU.

    Raises:
        InputError: there is an NVIDIA card that torch cannot use; see lit_gpt/nvidia_driver.py.
    """
    sees_cuda, why_not = look_for_cuda()
    if sees_cuda:
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    if why_not is not None:
        raise InputError(why_not)
    return "cpu"


def look_for_cuda() -> tuple[bool, str | None]:
    """Whether torch can use a GPU through CUDA; and why not, in a line, if this machine has an NVIDIA card."""
    with warnings.catch_warnings(record=True) as said:  # our line says it, too
        warnings.simplefilter("always")
        # is_available alone may have asked the driver's NVML, which also counts cards that CUDA cannot use: importing
        # Fabric makes it do so
        if torch.cuda.is_available() and torch._C._cuda_getDeviceCount() > 0:
            return True, None
    first_line = str(said[0].message).splitlines()[0] if said else ""
    return False, explain_unseen_card(first_line)


def default_device() -> torch.device:
    """The device of a script that runs in one process, ready to use.

    Raises:
        InputError: see `accelerator`.
    """
    kind = accelerator()
    prepare_device(kind)
    return torch.device(kind)


def prepare_device(kind: str) -> None:
    """Settings of PyTorch that the whole process needs on a kind of device; see `accelerator`."""
    if kind == "cuda":
        # On Hopper torch 2.11 and later prefer cuDNN's attention, which plans anew for every length and stride of its
        # inputs, and records have all lengths: tutorials/gpu.md has the figures
        torch.backends.cuda.enable_cudnn_sdp(False)


def own_card() -> tuple[str, float] | None:
    """The name of this machine's GPU, and its memory in GB (10^9 bytes); None if there is none.

    Raises:
        InputError: see `accelerator`.
    """
    if accelerator() != "cuda":
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / 1e9


def finish_work(device: torch.device) -> None:
    """Waits until a device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiling_pays(device: torch.device) -> bool:
    """Whether torch.compile is worth its time on a device: on CUDA, where steps wait for Python without it."""
    return device.type == "cuda"


def resolve_precision(precision: Precision) -> str:
    """The precision that "auto" stands for: bf16-true on a GPU that has bfloat16, else 32-true.

    Raises:
        InputError: see `accelerator`.
    """
    if precision != "auto":
        return precision
    # False: a GPU that only emulates bfloat16 does not count. On a CPU it can be 100 times slower than float32
    if accelerator() == "cuda" and torch.cuda.is_bf16_supported(False):
        return "bf16-true"
    return "32-true"


def weight_dtype(precision: Precision) -> torch.dtype:
    """The dtype that the loader stores frozen weights in. Mixed precision stores float32, and casts as it computes."""
    dtypes = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
    return dtypes.get(resolve_precision(precision), torch.float32)


def trained_dtype(precision: Precision) -> torch.dtype:
    """The dtype of a model's own weights where they train. Raises InputError for float16, in which they cannot."""
    dtype = weight_dtype(precision)
    if dtype == torch.float16:
        raise InputError(
            f"--precision {precision} is for LoRA and adapters: weights in float16 cannot be trained themselves."
            " Choose 16-mixed or bf16-true."
        )
    return dtype


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The dtype that mixed precision computes in; None for the others, which cast nothing."""
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return dtypes.get(precision)


def inference_dtype(precision: Precision) -> torch.dtype:
    """The dtype to load a model in that only answers. Raises InputError for mixed precision, which is for training."""
    if precision.endswith("mixed"):
        raise InputError(f"--precision {precision} is for training. Here, choose bf16-true, 16-true or 32-true.")
    return weight_dtype(precision)


def as_dtype(dtype: str | None) -> torch.dtype | None:
    """torch's dtype of that name. None, which keeps the dtype of a checkpoint, stays None."""
    if dtype is None:
        return None
    return getattr(torch, dtype)


def precision_plugin(precision: str, kind: str) -> Any:
    """Fabric's precision, but it casts no module: the loader has decided every tensor's dtype.

    Args:
        precision: Anything but "auto"; see `resolve_precision`.
        kind: The kind of device; see `accelerator`.
    """
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.plugins import Precision as FullPrecision

    # Under bf16-true Fabric 2.6 would cast float32 adapters, whose small updates would be rounded away, and the rotary
    # frequencies, which would put the cosine of position 1,000 off by 0.43.
    class AsLoaded(FullPrecision):
        def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
            return module

    class Mixed(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            # tokens and where they lie are integers: there is nothing to cast
            return data

    class Scaled(Mixed):
        """float16 weights and float32 adapters: nothing is autocast, but the loss is scaled."""

        def forward_context(self) -> Any:
            return nullcontext()

    if precision in ("16-mixed", "bf16-mixed"):
        return Mixed(precision, kind)  # type: ignore[arg-type] # one of these two
    if precision == "16-true":
        return Scaled("16-mixed", kind)
    return AsLoaded()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB (10^9 bytes): on its GPU, or, without one, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # here, since Windows has no such module
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage counts in bytes on macOS and in KiB on Linux
    unit = 1 if sys.platform == "darwin" else 1024
    return peak * unit / 1e9


def host_buffer(n_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes in the host's memory, uint8 (n_bytes,), from which `CopyStream` copies to a device.

    For CUDA they are pinned: the card reads them by itself, at the full speed of PCIe, and the system never moves them.
    PyTorch takes pinned memory in powers of two, 512 MiB for 441 MB; see `host_bytes_taken`.

    Raises:
        InputError: the host has no such memory left.
    """
    is_pinned = device.type == "cuda"
    try:
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"The host has no {n_bytes / 1e9:.2f} GB of memory left to pin: {first_line}") from None


def host_bytes_taken(n_bytes: int) -> int:
    """What `host_buffer` takes of the host's memory for so many bytes where it pins them: the next power of two."""
    # CachingHostAllocator.h of PyTorch 2.13. There its setting pinned_max_round_threshold_mb ends the rounding
    return 1 << max(0, n_bytes - 1).bit_length()


class CopyStream:
    """Copies from the host's memory to a device, beside what the device computes.

        computing    ...block 0...|............block 1...........|............block 2.........
        copying                   |block 2 to where block 0 was  |block 3 to where block 1 was

    On CUDA a copy begins when the device is done with all that it was asked for before, and what is to read it has to
    `wait`. Elsewhere nothing runs beside anything: a copy is done when it was asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Asks for a copy of `source`, which is in the host's memory. What is returned is for `wait`."""
        if self.stream is None:
            target.copy_(source)
            return None
        # if `target` is freed while a copy is under way, PyTorch gives its memory to nobody before that has ended
        target.record_stream(self.stream)
        # kernels that were asked for before may still read what is in `target`
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Lets the device begin what it is asked for from now on when that copy is complete; the host does not wait."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)


def recording_pays(device: torch.device) -> bool:
    """Whether `recorded` makes a function faster on a device: on CUDA, where decoding waits for Python without it."""
    return device.type == "cuda"


def recorded(function: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """A function that does the same on the device each time, as one graph that is started again, on CUDA.

    All that it reads and writes has to lie in the same tensors each time, and nothing in it may ask for a value. What
    it returns is the same memory in every call. It runs three times before it is recorded, so as to have chosen its
    kernels. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

    Raises:
        RuntimeError: something in it cannot be recorded.
    """
    if device.type != "cuda":
        return function
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay
