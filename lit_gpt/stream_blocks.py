"""Streamed blocks: frozen weights wait in the host's memory, and come to the device one block at a time.

Two slots on the device take turns. While a block computes, the next one is copied to the other slot:

    forward                                 backward, where each block is computed again first
    at work    copied meanwhile             at work    copied meanwhile
    0          1                            4          nothing: 3 is still there
    1          2, to where 0 was            3          2, to where 4 was
    2          3, to where 1 was            2          1, to where 3 was
    3          4, to where 2 was            1          0, to where 2 was
    4          nothing: 3 is still there    0          nothing: 1 is still there, and comes next

So a step moves the blocks over PCIe twice for each micro-batch, but for the four that are there already, and the device
holds two of them. Embedding, head, norms and adapters that train, and all that is no block, stay on the device.

A parameter stays the same object. Its `data` is a piece of a slot while its block is there, and else of the host's
memory: names, state dicts and files know nothing of it. Autograd would not know either: what forward keeps for backward
are such pieces, and by then the slot has another block's values. Hence every block is computed again in backward, and
`stream_blocks` itself sees to it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_gpt.device import CopyStream, host_buffer, host_bytes_taken
from lit_gpt.model.activation_checkpointing import recomputed
from lit_gpt.model.gpt import GPT

ALIGNMENT = 256  # bytes, as PyTorch allocates on CUDA: kernels may read 16 at once


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the bytes of its block."""

    offset: int
    n_bytes: int
    dtype: torch.dtype
    shape: torch.Size

    def tensor_in(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor in a buffer, uint8 (n,), without a copy."""
        piece = buffer[self.offset : self.offset + self.n_bytes]
        return piece.view(self.dtype).view(self.shape)


def lay_out(params: Iterable[torch.Tensor]) -> tuple[Place, ...]:
    """A place for each of these tensors, one after the other."""
    places = []
    offset = 0
    for param in params:
        n_bytes = param.numel() * param.element_size()
        places.append(Place(offset, n_bytes, param.dtype, param.shape))
        offset += -(n_bytes // -ALIGNMENT) * ALIGNMENT
    return tuple(places)


def size_of(places: Sequence[Place]) -> int:
    """The bytes that tensors in these places take together."""
    return max((place.offset + place.n_bytes for place in places), default=0)


class HostBlock:
    """The frozen parameters of a block, which lie in one piece of the host's memory."""

    def __init__(self, params: Sequence[nn.Parameter], device: torch.device) -> None:
        """Copies the values of `params` to the host's memory, and lets them point there."""
        self.params = params
        self.places = lay_out(params)
        self.buffer = host_buffer(size_of(self.places), device)
        self.at_rest = [place.tensor_in(self.buffer) for place in self.places]
        for param, tensor in zip(params, self.at_rest, strict=True):
            tensor.copy_(param.data)
        self.point_to(self.at_rest)

    def point_to(self, tensors: Sequence[torch.Tensor]) -> None:
        """Gives each parameter other memory; the values there are its own."""
        for param, tensor in zip(self.params, tensors, strict=True):
            param.data = tensor


class Slot:
    """Room for one block on the device."""

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        self.block: HostBlock | None = None  # whose values are here, or on their way
        self.copied: Any = None  # what to wait for before they are read
        # blocks of one kind have the same places. These are made once: generation runs in inference mode, where tensors
        # would be made that backward cannot use
        self.tensors: dict[tuple[Place, ...], list[torch.Tensor]] = {}

    def make_tensors(self, places: tuple[Place, ...]) -> None:
        if places not in self.tensors:
            self.tensors[places] = [place.tensor_in(self.buffer) for place in places]


class BlockStream:
    """The blocks of a model, and the two slots through which they come to the device."""

    def __init__(self, blocks: Sequence[HostBlock], device: torch.device) -> None:
        n_bytes = max(size_of(block.places) for block in blocks)
        self.blocks = blocks
        self.slots = [Slot(n_bytes, device), Slot(n_bytes, device)]
        for slot in self.slots:
            for block in blocks:
                slot.make_tensors(block.places)
        self.copies = CopyStream(device)
        self.at_work: int | None = None  # the number of the block that was begun last
        self.n_copied = 0  # bytes, since the beginning

    def begin(self, number: int) -> None:
        """Called before a block computes: its values are on the device then, and those of the next one on their way.

        A block that is not the one that was expected costs the time of its copy, and nothing else.
        """
        slot = self.fetch(number)
        self.copies.wait(slot.copied)
        following = self.following(number)
        self.at_work = number
        self.fetch(following)

    def fetch(self, number: int) -> Slot:
        """The slot that has a block, or gets it now. The block that is at work stays where it is."""
        block = self.blocks[number]
        for slot in self.slots:
            if slot.block is block:
                return slot

        # the other slot's block goes. All that reads it has been asked of the device by now: its own backward, too,
        # since gradients come to a block only through all the later ones
        at_work = None if self.at_work is None else self.blocks[self.at_work]
        slot = next(slot for slot in self.slots if slot.block is None or slot.block is not at_work)
        if slot.block is not None:
            slot.block.point_to(slot.block.at_rest)
        n_bytes = block.buffer.numel()
        slot.block = block
        slot.copied = self.copies.copy(slot.buffer[:n_bytes], block.buffer)
        self.n_copied += n_bytes
        block.point_to(slot.tensors[block.places])
        return slot

    def following(self, number: int) -> int:
        """The block that is likely to be next, when block `number` begins."""
        last = len(self.blocks) - 1
        if number == last:
            # backward begins here, if there is one; else the next pass begins at the bottom
            return max(0, last - 1) if torch.is_grad_enabled() else 0
        if self.at_work == number + 1 and number > 0:  # on the way back
            return number - 1
        return number + 1

    @property
    def device_bytes(self) -> int:
        """The memory of both slots."""
        return sum(slot.buffer.numel() for slot in self.slots)

    @property
    def host_bytes(self) -> int:
        """The host's memory that the blocks take where it is pinned."""
        return sum(host_bytes_taken(block.buffer.numel()) for block in self.blocks)


def stream_blocks(model: GPT, device: torch.device) -> None:
    """Moves the frozen weights of all blocks to the host's memory, in place, and all others to `device`.

    The model is loaded and adapted by then, and it is known which parameters train. From now on each block is computed
    again in backward. Loss and gradients stay what they are without streaming, to the bit.

    Raises:
        InputError: the host has not enough memory that can be pinned.
    """
    host_blocks = []
    for block in model.transformer.h:
        frozen = [param for param in block.parameters() if not param.requires_grad]
        # one after the other: what a block had before is freed when the next one is copied
        host_blocks.append(HostBlock(frozen, device))
    at_rest = {id(param) for block in host_blocks for param in block.params}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in at_rest and tensor.device != device:
            tensor.data = tensor.data.to(device)

    stream = BlockStream(host_blocks, device)
    for number, block in enumerate(model.transformer.h):
        # in this order: a block is also fetched to be computed again
        block.forward = recomputed(fetched_before(block.forward, stream, number))
    model.block_stream = stream  # type: ignore[assignment] # a plain attribute, and no module


def fetched_before(
    forward: Callable[..., torch.Tensor], stream: BlockStream, number: int
) -> Callable[..., torch.Tensor]:
    """A function that does what `forward` of block `number` does, when its weights are on the device."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        stream.begin(number)
        return forward(*args, **kwargs)

    return run


def stream_of(model: nn.Module) -> BlockStream | None:
    """The stream of a model's blocks; None if they are not streamed."""
    return getattr(model, "block_stream", None)
