"""Which bytes are alive at each moment of a step, and what they are for.

The ledger enters every storage when it is born and when it dies:

    event       storage 0 born    1 born    2 born    1 dies    3 born
    bytes            +100          +40       +60       -40       +30
    alive             100          140       200       160       190        the peak is 200: 0, 1 and 2

torch.distributed._tools.mem_tracker.MemTracker of PyTorch 2.13 is meant for the same, and was tried in its place: it
gives no figure for our steps. It hooks into the gradient of every parameter, and so stops at the first that is frozen
(LoRA, adapters); and it stops at gradients that are taken in a forward pass, as `SummedLoss` does (full fine-tuning).
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import QuantizedLinear
from lit_gpt.stream_blocks import stream_of

PARTS = ("weights", "quantized", "trained", "gradients", "optimizer", "activations", "logits", "workspace")


# By this C++ asks a fake tensor for its device: two thirds of all calls that a ledger sees. It answers at once what
# FakeTensorMode would answer in the end, and a plan takes an eighth less time
DEVICE = torch.ops.prim.device.default


class Ledger(TorchDispatchMode):
    """Enters all storages that are made while it is on: their bytes, their part of the step, and when they die."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "workspace"  # of what is made from now on
        self.events: list[tuple[int, int]] = []  # (number of a storage, its bytes or minus them)
        # numbers, since the id of a dead storage may be given to another
        self.part_of: dict[int, str] = {}  # by the number of a storage, dead ones too
        self.number_of: dict[int, int] = {}  # by the id of a living storage
        self.alive = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        # views and results in place share a storage that is entered already
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.enter(tensor)
        return out

    def enter(self, tensor: torch.Tensor, part: str | None = None) -> None:
        """Enters a tensor's storage, once. `part` is told of one that was entered before, too, if more is known now."""
        storage = tensor.untyped_storage()
        # PyTorch keeps one object per storage for as long as the storage lives
        key = id(storage)
        if key in self.number_of:
            if part is not None:
                number = self.number_of[key]
                self.part_of[number] = part
            return

        # its birth, and a note for its death
        number = len(self.part_of)
        size = storage.nbytes()
        self.number_of[key] = number
        self.part_of[number] = part or self.part
        self.add_event(number, size)
        death = weakref.finalize(storage, self.enter_death, key, number, size)
        death.atexit = False  # what outlives the program needs no entry

    def enter_death(self, key: int, number: int, size: int) -> None:
        del self.number_of[key]
        self.add_event(number, -size)

    def add_event(self, number: int, size: int) -> None:
        self.events.append((number, size))
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def at_peak(self) -> Counter[str]:
        """Bytes of each part at the first moment when `peak` bytes were alive."""
        alive: Counter[str] = Counter()
        total = 0
        for number, size in self.events:
            total += size
            part = self.part_of[number]
            alive[part] += size
            if total == self.peak:
                break
        return alive


@dataclass(frozen=True)
class Plan:
    """The memory at the peak of a step."""

    parts: dict[str, int]
    """Bytes at the peak, by PARTS."""
    host_bytes: int = 0
    """What streamed blocks take of the host's memory, besides."""

    @property
    def gb(self) -> float:
        return sum(self.parts.values()) / 1e9

    @property
    def model_gb(self) -> float:
        """The model alone, as it is before the first step."""
        return (self.parts["weights"] + self.parts["quantized"] + self.parts["trained"]) / 1e9

    def __str__(self) -> str:
        """Such as: 0.52 GB (weights 0.27, activations 0.22). Parts under 2 % are left out."""
        least = 0.02 * 1e9 * self.gb
        texts = []
        # the largest first
        for part in sorted(PARTS, key=self.parts.__getitem__)[::-1]:
            size = self.parts[part]
            if size > least:
                texts.append(f"{part} {size / 1e9:.2f}")
        besides = f" and {self.host_bytes / 1e9:.2f} GB of the host's memory" if self.host_bytes else ""
        return f"{self.gb:.2f} GB ({', '.join(texts)}){besides}"


def quantized_params(model: nn.Module) -> Iterator[nn.Parameter]:
    """The codes and scales of all quantized linears."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for name in module.layout():
                yield getattr(module, name)


def enter_model(model: GPT, ledger: Ledger) -> None:
    """Enters the parameters and buffers of a model, trained or frozen.

    Of streamed blocks the slots are entered, and not what lies in the host's memory.
    """
    quantized = {id(param) for param in quantized_params(model)}
    stream = stream_of(model)
    on_host = set()
    if stream is not None:
        on_host = {id(param) for block in stream.blocks for param in block.params}
        for slot in stream.slots:
            ledger.enter(slot.buffer, "quantized" if quantized else "weights")
    for param in model.parameters():
        if id(param) in on_host:
            continue
        if param.requires_grad:
            ledger.enter(param, "trained")
        elif id(param) in quantized:
            ledger.enter(param, "quantized")
        else:
            ledger.enter(param, "weights")
    for buffer in model.buffers():
        ledger.enter(buffer, "weights")


@contextmanager
def part_of_head(model: GPT, ledger: Ledger) -> Iterator[None]:
    """Books what a forward pass makes from the final norm on as logits: the head and the loss are all that follows."""

    def enter_logits(*_: Any) -> None:
        ledger.part = "logits"

    hook = model.transformer.ln_f.register_forward_hook(enter_logits)
    try:
        yield
    finally:
        hook.remove()
