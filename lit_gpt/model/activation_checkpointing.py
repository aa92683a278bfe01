"""How the blocks of a built model run: computed again in backward, or compiled. Neither changes a parameter's name.

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
    for block in model.transformer.h if how != "none" else ():
        part = block if how == "block" else block.mlp
        part.forward = recomputed(part.forward)


def recomputed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*args: Any) -> torch.Tensor:
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return run
