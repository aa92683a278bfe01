"""Activation checkpointing: parts of a model are computed again in backward instead of kept in memory.

none        forward keeps all that backward needs: the most memory, the least time
selective   the MLPs, which keep the most, are computed again
12          of the first 12 blocks only the input is kept, and each is computed again; the others keep all
block       the same with all blocks: the least memory, a third more time

Why the first blocks: backward begins at the last one, and a block that is computed again has its own activations for
that while, on top of what the blocks below it keep. What is alive in backward, in activations of one block:

    backward at block        3    2    1    0
    the first 2 again        2    2    1    1
    the last 2 again         3    3    2    1

Before that, while the logits are there, both hold 2. Where the base is frozen this moment mostly decides the peak, and
it matters little which blocks are chosen. Where the base trains, gradients pile up as backward goes on, the peak may
come later, and the first blocks are the better ones: planned for Llama 3.2 1B in bfloat16 with 4,096 tokens, 12 of 16
blocks, 10.95 GB instead of 11.10. Blocks below all that trains keep nothing: computing them again saves nothing.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from lit_gpt.model.gpt import GPT
from lit_gpt.ranges import check_range

ActivationCheckpointing = Literal["none", "selective", "block"] | int


def check_recomputed(how: ActivationCheckpointing, n_layer: int) -> None:
    """Raises InputError if `how` is a number of blocks that a model of `n_layer` blocks does not have."""
    if isinstance(how, int):
        check_range("--activation_checkpointing", how, at_least=1, at_most=n_layer)


def recompute_blocks(model: GPT, how: ActivationCheckpointing) -> None:
    """Makes the blocks keep less for backward, in place. Loss and gradients stay the same, dropout too.

    Raises:
        InputError: see `check_recomputed`.
    """
    blocks = list(model.transformer.h)
    check_recomputed(how, len(blocks))
    if how == "none":
        return
    parts = [block.mlp for block in blocks] if how == "selective" else blocks
    if isinstance(how, int):
        parts = blocks[:how]
    for part in parts:
        # `forward` is replaced, and no module put around it: names of parameters stay those of the checkpoint
        part.forward = recomputed(part.forward)


def recomputed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that does what `forward` does, and calls it again in backward."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
