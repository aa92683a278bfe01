"""How long the operations of a step take on a card, by count.

Each operation that the dispatcher sees takes

    max(floating-point operations / rate of the products, bytes read and written / bandwidth)

and the host some time to start it. A view costs nothing. What is computed again in backward is counted again, since the
real backward runs.

    eager       every operation reads its inputs from memory and writes its output
    compiled    operations between two products are one kernel: it reads each input once, and writes what is still
                needed when the next product begins; the host starts a block with all its kernels, and each product

"Compiled" is a picture of `torch.compile`, and not its plan: a compiler may keep less or more between the two passes.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lit_gpt.memory.speed import Speed

aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """What a part of a step costs."""

    seconds: float = 0.0
    """The device is at work for so long."""
    host_seconds: float = 0.0
    """The host needs so long to start the operations."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.seconds + other.seconds, self.host_seconds + other.host_seconds)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.seconds - other.seconds, self.host_seconds - other.host_seconds)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.seconds * factor, self.host_seconds * factor)

    def at_least(self, seconds: float) -> "Work":
        """The same beside something else that takes so long: whichever is longer."""
        return Work(max(self.seconds, seconds), self.host_seconds)

    def total(self, speed: Speed) -> float:
        """Seconds of both. A device that works while the host starts what comes next waits for the longer one."""
        if speed.overlaps:
            return max(self.seconds, self.host_seconds)
        return self.seconds + self.host_seconds


class Clock:
    """Adds up the work of all operations that it is told of."""

    def __init__(self, speed: Speed, compiled: bool = False) -> None:
        self.speed = speed
        self.compiled = compiled
        self.work = Work()
        # compiled: storages that the kernel at hand has read and made; those made may be gone by its end
        self.read: set[int] = set()
        self.made: dict[int, weakref.ref] = {}
        self.kernel_bytes = 0
        self.in_attention = False
        self.in_block = False

    def enter_section(self, in_block: bool) -> None:
        """A part of the step begins. A compiled block is started with all its kernels."""
        self.end_kernel()
        self.in_block = in_block
        if in_block and self.compiled:
            self.work += Work(0.0, self.speed.start_of_block)

    def enter(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Counts an operation that has been called."""
        if is_free(func):
            return
        packet = func.overloadpacket
        if func.name() == "bitsandbytes::gemm_4bit":
            self.end_kernel()
            self.add_product_with_codes(args, bytes_of(func, args, kwargs, out))
            return
        product = PRODUCTS.get(packet)
        attention = ATTENTION.get(packet)
        if product is not None:
            self.end_kernel()
            seconds = self.speed.seconds_of_product(product(args), out.shape[-2], dtype_of(args))
            self.add(seconds, bytes_of(func, args, kwargs, out))
        elif attention is not None:
            self.end_kernel()
            rate = self.speed.attention_rate(dtype_of(args))
            # a loop over records stands for one call of all of them, where the device has such a kernel
            is_next_record = self.in_attention and self.speed.overlaps
            self.add(attention(args) / rate, bytes_of(func, args, kwargs, out), is_started=not is_next_record)
            self.in_attention = True
            return
        elif self.compiled:
            self.add_to_kernel(func, args, kwargs, out)
            return
        else:
            self.add(0.0, bytes_of(func, args, kwargs, out))
        self.in_attention = False

    def add(self, seconds_of_arithmetic: float, n_bytes: int, is_started: bool = True) -> None:
        """Adds an operation, which the host starts by itself or not."""
        seconds = max(seconds_of_arithmetic, n_bytes / self.speed.bandwidth)
        self.work += Work(seconds, self.speed.start if is_started else 0.0)

    def add_product_with_codes(self, args: tuple, n_bytes: int) -> None:
        """Adds x W^T where 4-bit codes stand for W: for more than a few tokens W is written, and read again."""
        x, _, (rows, columns), *_ = args
        weight_bytes = rows * columns * x.element_size()
        self.add(0.0, weight_bytes)
        n_tokens = x.numel() // columns
        self.add(self.speed.seconds_of_product(2 * x.numel() * rows, n_tokens, x.dtype), n_bytes + weight_bytes)

    def add_to_kernel(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Adds an operation to the kernel at hand: what it reads for the first time, and what it makes."""
        for tensor in inputs_of(func, args, kwargs):
            key = id(tensor.untyped_storage())
            if key not in self.made and key not in self.read:
                self.read.add(key)
                self.kernel_bytes += n_bytes_of(tensor)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[id(storage)] = weakref.ref(storage)

    def end_kernel(self) -> None:
        """Ends the kernel at hand: what it made is written if it is still there."""
        if not self.made and not self.read:
            return
        n_bytes = self.kernel_bytes
        for storage_of in self.made.values():
            storage = storage_of()
            if storage is not None:
                n_bytes += storage.nbytes()
        self.read = set()
        self.made = {}
        self.kernel_bytes = 0
        self.in_attention = False
        self.add(0.0, n_bytes, is_started=not self.in_block)

    def reading(self) -> Work:
        """The work so far."""
        self.end_kernel()
        return self.work


def is_free(func: Any) -> bool:
    """Whether an operation moves nothing: a view, a question about a tensor, or memory without contents."""
    if func.namespace not in ("aten", "bitsandbytes"):
        return True
    packet = func.overloadpacket
    return getattr(func, "is_view", False) or packet in FREE


FREE = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten.promote_types,
    aten.alias,
    aten.detach,
    aten.sym_size,
    aten.is_same_size,
}

# of their first argument they read nothing, or as many values as they put out
WRITES_FIRST = {aten.copy_, aten.fill_, aten.zero_}
GATHERS_FIRST = {aten.embedding, aten.index_select, aten.gather}


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def inputs_of(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that an operation reads."""
    packet = func.overloadpacket
    if packet in WRITES_FIRST or packet in GATHERS_FIRST or packet in LIKE:
        args = args[1:]
    return tensors_in((args, kwargs))


LIKE = {aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full}


def n_bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of the values of a tensor, at most those of its storage: one that is expanded has fewer."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def bytes_of(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes that an operation reads and writes."""
    n_bytes = sum(map(n_bytes_of, inputs_of(func, args, kwargs)))
    written = sum(map(n_bytes_of, tensors_in(out)))
    if func.overloadpacket in GATHERS_FIRST:
        n_bytes += written
    if out is None:
        # such as an optimizer's: it writes what it reads
        written = n_bytes
    return n_bytes + written


def dtype_of(args: tuple) -> torch.dtype:
    """The dtype of the arithmetic: that of the first tensor of floats."""
    for tensor in tensors_in(args):
        if tensor.is_floating_point():
            return tensor.dtype
    raise AssertionError("a product has floats")


# ---- floating-point operations


def of_matrices(a: torch.Tensor, b: torch.Tensor) -> float:
    """(..., m, k) times (..., k, n): a product and a sum for each of m k n."""
    return 2 * a.numel() * b.shape[-1]


def of_attention(q: torch.Tensor, k: torch.Tensor, is_causal: bool) -> float:
    """Scores and their sum over values, of (B, nh, T, hs) and (B, ng, S, hs); half of it where the later ones are
    masked."""
    full = 4 * q.numel() * k.shape[-2]
    return full / 2 if is_causal else full


def flag(args: tuple, index: int) -> bool:
    return len(args) > index and bool(args[index])


Count = Callable[[tuple], float]

PRODUCTS: dict[Any, Count] = {
    aten.mm: lambda args: of_matrices(args[0], args[1]),
    aten.bmm: lambda args: of_matrices(args[0], args[1]),
    aten.addmm: lambda args: of_matrices(args[1], args[2]),
    aten.addmm_: lambda args: of_matrices(args[1], args[2]),
    aten.baddbmm: lambda args: of_matrices(args[1], args[2]),
}

# backward has five products where forward has two
ATTENTION: dict[Any, Count] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda args: of_attention(args[0], args[1], flag(args, 4)),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda args: (
        2.5 * of_attention(args[1], args[2], flag(args, 7))
    ),
}
