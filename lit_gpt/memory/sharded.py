"""The memory of one device of several that share a model, worked out from a step on a single one.

torch's `fully_shard` (lit_gpt/sharding.py) keeps the rows of one device of every parameter, gradient and state of the
optimizer, and puts a block together while it is at work:

    always           1 / n of the weights and codes, of what trains, of its gradients and of the optimizer's state
    in the step      the embedding, the last norm and the head, whole: they are one group, which stays together from
                     the first forward to the end of backward
    at one moment    the block at work, whole, and the next one, which is gathered meanwhile; in backward, too,
                     the gradients of what trains in that block, whole, and once more as they are sent;
                     and those of the last norm and the head, which are sent last of all
    of its own       activations, logits and workspace of the device's micro-batch: nothing of them is shared
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_gpt.checkpoint.load import build_model
from lit_gpt.memory.plan import Setup, adapt, fill_with_zeros
from lit_gpt.memory.profile import BACKWARD, STEP, Profile, profile_of
from lit_gpt.memory.speed import Speed
from lit_gpt.quantize import quantize_linears

# sections are asked for their memory here, and not for their time
ANY_SPEED = Speed("none", {torch.float32: 1.0}, {torch.float32: 1.0}, 1.0, 1.0, start=0.0, start_of_block=0.0)


@dataclass(frozen=True)
class WholeBytes:
    """What is whole on every device for a while."""

    root: int
    """The parameters that are in no block."""
    root_gradients: int
    """Those of the last norm and the head, which are there from the begin of backward on."""
    block: int
    """The parameters of the largest block."""
    block_gradients: int
    trained: int
    """All that trains, which is never whole."""


def sharded_peak(setup: Setup, n_devices: int) -> float:
    """Bytes of each device at the peak of a step.

    Raises:
        InputError: see `plan`.
    """
    # gradients are in what is there before, where they can be divided
    _, profile = profile_of(replace(setup, accumulates=True), ANY_SPEED)
    return sharded_peak_of(profile, whole_bytes(setup), n_devices, setup.accumulates)


def sharded_peak_of(profile: Profile, whole: WholeBytes, n_devices: int, accumulates: bool) -> float:
    """Bytes of each device at the peak.

    Args:
        profile: A step on one device, at whose begin all gradients are there.
        whole: What is whole for a while.
        n_devices: How many devices share the model.
        accumulates: Whether the gradients are really there before: in all micro-batches but the first.
    """
    alive = 0  # of the device's own
    highest = 0.0
    in_backward = False
    for section in profile.sections:
        in_backward |= section.kind == BACKWARD
        split = profile.before
        here = alive + section.rise
        if section.kind != STEP:
            here += whole.root + 2 * whole.block
        if in_backward:
            here += whole.root_gradients + 2 * whole.block_gradients
        elif not accumulates:
            split -= whole.trained
        highest = max(highest, split / n_devices + here)
        alive += section.net
    return highest


def whole_bytes(setup: Setup) -> WholeBytes:
    """The bytes of blocks and of the rest, as the model is loaded."""
    model = build_model(setup.config)
    quantize_linears(model, setup.quantize)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill_with_zeros(model, setup)
        adapted = adapt(model, replace(setup, activation_checkpointing="none", stream_blocks=False))
        blocks = list(adapted.transformer.h)
        of_blocks = {id(param) for block in blocks for param in block.parameters()}
        root = [param for param in adapted.parameters() if id(param) not in of_blocks]
        # the embedding's own gradient comes at the very end, and is in the plan: unless it is the head, too
        is_tied = setup.config.tie_embeddings
        after_blocks = [param for param in root if is_tied or param is not adapted.transformer.wte.weight]
        return WholeBytes(
            root=bytes_of(root),
            root_gradients=bytes_of(trainable(after_blocks)),
            block=max(bytes_of(block.parameters()) for block in blocks),
            block_gradients=max(bytes_of(trainable(block.parameters())) for block in blocks),
            trained=bytes_of(trainable(adapted.parameters())),
        )


def trainable(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [param for param in params if param.requires_grad]


def bytes_of(params: Iterable[torch.Tensor]) -> int:
    return sum(param.numel() * param.element_size() for param in params)
