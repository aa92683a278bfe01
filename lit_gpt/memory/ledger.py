"""TODO doc of memory.ledger"""

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

PARTS = ("weights", "quantized", "trained", "gradients", "optimizer", "activations", "logits", "workspace")


class Ledger(TorchDispatchMode):
    """Every storage that is made while it is on, with its bytes, the part of the step, and when it died."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "workspace"
        self.events: list[tuple[int, int]] = []  # (which storage, its bytes or minus them)
        self.parts: dict[int, str] = {}
        self.known: dict[int, int] = {}  # id of a living storage -> its number
        self.alive, self.peak = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return out

    def note(self, tensor: torch.Tensor, part: str | None = None) -> int:
        """Enters a tensor's storage, once, and returns its number; `part` says better what an entered one is."""
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch keeps one object per storage for as long as the storage lives
        if key not in self.known:
            number = self.known[key] = len(self.parts)
            self.parts[number] = part or self.part
            self.book(number, storage.nbytes())
            weakref.finalize(storage, self.died, key, number, storage.nbytes()).atexit = False
        elif part is not None:
            self.parts[self.known[key]] = part
        return self.known[key]

    def died(self, key: int, number: int, size: int) -> None:
        del self.known[key]
        self.book(number, -size)

    def book(self, number: int, size: int) -> None:
        self.events.append((number, size))
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def at_peak(self) -> Counter[str]:
        """Bytes of each part at the moment when the most was alive."""
        total, alive, most = 0, Counter(), 0
        found: Counter[str] = Counter()
        for number, size in self.events:
            total += size
            alive[self.parts[number]] += size
            if total > most and total == self.peak:
                most, found = total, Counter(alive)
        return found


@dataclass(frozen=True)
class Plan:
    parts: dict[str, int]
    """Bytes at the peak, by PARTS."""

    @property
    def gb(self) -> float:
        return sum(self.parts.values()) / 1e9

    def __str__(self) -> str:
        large = sorted((part for part in PARTS if self.parts[part] > 0.02 * 1e9 * self.gb), key=self.parts.get)[::-1]
        return f"{self.gb:.2f} GB ({', '.join(f'{part} {self.parts[part] / 1e9:.2f}' for part in large)})"


def quantized_params(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            yield from (getattr(module, name) for name in module.layout())


def enter_model(model: GPT, ledger: Ledger) -> None:
    codes = {id(param) for param in quantized_params(model)}
    for param in model.parameters():
        part = "quantized" if id(param) in codes else "weights"
        ledger.note(param, "trained" if param.requires_grad else part)
    for buffer in model.buffers():
        ledger.note(buffer, "weights")


@contextmanager
def part_of_head(model: GPT, ledger: Ledger) -> Iterator[None]:
    """From the final norm on, all that a forward pass makes is there for the sake of the logits."""

    def enter(*_: Any) -> None:
        ledger.part = "logits"

    hook = model.transformer.ln_f.register_forward_hook(enter)
    try:
        yield
    finally:
        hook.remove()
