"""Compiled blocks: faster steps after a slow first one."""

import torch

from lit_gpt.model.attention import compute_attention
from lit_gpt.model.gpt import GPT


def compile_blocks(model: GPT) -> None:
    """Compiles the blocks with torch.compile, in place. Lengths stay free, so that a batch compiles nothing anew.

    Attention is left out: where records begin differs from batch to batch, and its kernels are fused already.
    """
    eager_attention = torch.compiler.disable(compute_attention)
    for block in model.transformer.h:
        # one function for all blocks: Dynamo gives up, without an error, after recompiling the same code 8 times
        # (torch._dynamo.config.recompile_limit, torch 2.13)
        block.attn.attention_function = eager_attention
        block.compile(dynamic=True)
