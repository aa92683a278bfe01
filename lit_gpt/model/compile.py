"""Compiled blocks: faster steps after a slow first one."""

import torch

from lit_gpt.model.gpt import GPT


def compile_blocks(model: GPT) -> None:
    """Compiles the blocks with torch.compile, in place. Lengths stay free, so that a batch compiles nothing anew.

    Blocks of one kind are one graph, which is compiled once. On CUDA in half precision attention is in it; elsewhere it
    is a loop over records, which runs as it is between two graphs.
    """
    # Dynamo gives up on a function that it has compiled so often, with a warning, and runs it as it is. A model has few
    # kinds of blocks, but each is compiled for training, for validation and for answers
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    model.transformer.wte.register_forward_hook(ask_for_gradient)
    for block in model.transformer.h:
        # `forward`, and not the block: the hooks by which weights are put together from slices stay outside
        block.forward = torch.compile(block.forward, dynamic=True)


def ask_for_gradient(wte: torch.nn.Module, inputs: tuple, x: torch.Tensor) -> None:
    """A hook: the first block gets an input like that of all others, or it would be compiled for itself."""
    if torch.is_grad_enabled():
        x.requires_grad_()
