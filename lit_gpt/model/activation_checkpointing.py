"""Activation checkpointing: parts of a model are computed again in backward instead of kept in memory.

none        forward keeps all that backward needs: the most memory, the least time
selective   the MLPs, which keep the most, are computed again
block       only the input of each block is kept, and the block computed again: the least memory, a third more time"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from lit_gpt.model.gpt import GPT

ActivationCheckpointing = Literal["none", "selective", "block"]


def recompute_blocks(model: GPT, how: ActivationCheckpointing) -> None:
    """Makes the blocks keep less for backward, in place. Loss and gradients stay the same, dropout too."""
    if how == "none":
        return
    for block in model.transformer.h:
        part = block if how == "block" else block.mlp
        # `forward` is replaced, and no module put around it: names of parameters stay those of the checkpoint
        part.forward = recomputed(part.forward)


def recomputed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that does what `forward` does, and calls it again in backward."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
