"""TODO doc of model.compile"""

import torch

from lit_gpt.model.gpt import GPT


def compile_blocks(model: GPT) -> None:
    """Compiles the blocks with torch.compile, in place; lengths stay free, so that a batch compiles nothing anew.

    Attention is left out: where records begin differs from batch to batch, and its kernels are fused already.
    """
    for block in model.transformer.h:
        block.attn.look = torch.compiler.disable(block.attn.look)
        block.compile(dynamic=True)
