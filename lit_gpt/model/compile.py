"""Compiled blocks: faster steps after a slow first one."""

import shutil
import sysconfig
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_gpt.model.attention import Kernel, Mask, compute_attention, takes_one_call
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Layout


def compile_blocks(model: GPT) -> None:
    """Compiles the blocks and the loss with torch.compile, in place, for training.

    Blocks of one kind are one graph, which is compiled once, within 15 seconds or so; lengths stay free, so that no
    batch compiles anything anew. On CUDA in half precision attention is in the graph; elsewhere it is a loop over
    records, which runs as it is between two graphs. Without gradients, to validate and to answer, blocks run as they
    are: each kind of call would have to be compiled for itself.
    """
    # of the loss, whose rows are long: nothing can be done about it
    warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled")

    # Dynamo gives up on a function that it has compiled so often, with a warning, and runs it as it is. Half a dozen
    # are usual: records that share prefixes and others, blocks with LoRA and others
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)

    attention = one_call_in_the_graph()
    model.loss_and_gradient = torch.compile(model.loss_and_gradient, dynamic=True)
    model.transformer.wte.register_forward_hook(ask_for_gradient)
    for block in model.transformer.h:
        # `forward`, and not the block: the hooks by which weights are put together from slices stay outside
        block.forward = compiled_in_training(block.forward)
        block.attn.attention_function = attention


def one_call_in_the_graph() -> Kernel:
    """Attention for compiled blocks: one call is part of the graph, all else runs as it is.

    How many segments a loop goes through differs from batch to batch, and with a cache so does the mask.
    """
    not_compiled = torch.compiler.disable(compute_attention)

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        softcap: float | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        kernel = compute_attention if takes_one_call(mask, q, softcap) else not_compiled
        return kernel(q, k, v, mask, softcap=softcap, **settings)

    return attend


def compiled_in_training(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that does what `forward` does, compiled where gradients are asked for."""
    compiled = torch.compile(forward, dynamic=True)

    def run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: Mask = None, *others: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(x, cos, sin, mask, *others)
        if isinstance(mask, Layout):
            _ = mask.varlen  # made by the first block that asks: the compiler cannot read how
        return compiled(x, cos, sin, mask, *others)

    return run


def ask_for_gradient(wte: nn.Module, inputs: tuple, x: torch.Tensor) -> None:
    """A hook: the first block gets an input like that of all others, or it would be compiled for itself."""
    if torch.is_grad_enabled():
        x.requires_grad_()


def missing_for_compiling(device: torch.device) -> list[str]:
    """What torch.compile needs for a device, and this machine does not have."""
    missing = []
    if device.type != "cpu" and find_spec("triton") is None:
        missing.append("the package triton (pip install triton)")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        missing.append("a C compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python's headers (Python.h)")
    return missing
