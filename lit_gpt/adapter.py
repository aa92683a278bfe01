"""LLaMA-Adapter: learn a few vectors that the upper blocks look at besides the text. https://arxiv.org/abs/2303.16199

    y = attention(q, k, v) + g attention(q, K p, V p)      p (L, C) the prompt, g (heads) zero at the start

The prompt p of a block goes through the block's own frozen key and value projections, without a position. Its softmax
is its own, so that at g = 0 nothing has changed. Nothing is remembered between two calls: what was computed from p
before a step would be wrong after it, and p would never train.

Version 2 (https://arxiv.org/abs/2304.15010) also trains the norms, and a bias and a scale of every linear:

    y = s (W x + b)      W frozen, s (out) one and b (out) zero at the start

`apply_adapter` and `apply_adapter_v2` change a built model in place, whatever its linears are made of.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_gpt.errors import InputError
from lit_gpt.model.attention import CausalSelfAttention, View
from lit_gpt.model.gpt import GPT
from lit_gpt.replace_modules import replace_modules


@dataclass(frozen=True)
class Adapter:
    """What the prompts are."""

    prompt_length: int = 10
    """Vectors in the prompt of each block."""
    start_layer: int = 2
    """The first block that has one; the lowest blocks are better left alone."""

    def __post_init__(self) -> None:
        if self.prompt_length < 1 or self.start_layer < 0:
            raise InputError(
                f"adapter.prompt_length is {self.prompt_length}, expected 1 or more; adapter.start_layer"
                f" {self.start_layer}, expected 0 or more."
            )


class AdaptedAttention(CausalSelfAttention):
    """A model's attention, with all it has under the same names, and a prompt. Prompt and gates are float32."""

    def __init__(self, attention: CausalSelfAttention, prompt_length: int) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(attention))
        like = dict(device=next(attention.parameters()).device, dtype=torch.float32)
        # as large as what a norm gives to the same projections
        self.adapter_prompt = nn.Parameter(torch.randn(prompt_length, self.q.in_features, **like))
        self.adapter_gate = nn.Parameter(torch.zeros(self.q.out_features // self.head_size, 1, 1, **like))

    def look(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, view: View) -> torch.Tensor:
        prompt = self.adapter_prompt.to(q.dtype)[None]  # (1, L, C)
        keys = self.split(self.norm_k(self.k(prompt))).expand(q.size(0), -1, -1, -1)  # (B, ng, L, hs)
        values = self.split(self.norm_v(self.v(prompt))).expand(q.size(0), -1, -1, -1)
        everything = torch.ones(q.size(2), keys.size(2), dtype=torch.bool, device=q.device)
        y = self.attention(q, keys, values, everything)  # (B, nh, T, hs)
        return super().look(q, k, v, view) + self.adapter_gate.to(y.dtype) * y


class AdapterV2Linear(nn.Module):
    """A frozen linear with a trained bias and scale in float32, whatever the linear is stored in."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        like = dict(device=next(linear.parameters()).device, dtype=torch.float32)
        self.adapter_bias = nn.Parameter(torch.zeros(linear.out_features, **like))
        self.adapter_scale = nn.Parameter(torch.ones(linear.out_features, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))


def apply_adapter(model: GPT, adapter: Adapter) -> list[str]:
    """Gives the blocks from `start_layer` on a prompt, in place, and returns the names of their attentions.

    Raises:
        InputError: the model has no such block, or already carries an adapter.
    """
    n_layer = model.config.n_layer
    if adapter.start_layer >= n_layer:
        raise InputError(
            f"adapter.start_layer is {adapter.start_layer}, but the model's blocks are 0 to {n_layer - 1}."
        )
    if any(adapter_filter(name) for name, _ in model.named_parameters()):
        raise InputError("This model already carries an adapter. Load the base model again.")

    def swap(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, CausalSelfAttention) and int(name.split(".")[2]) >= adapter.start_layer:
            return AdaptedAttention(module, adapter.prompt_length)
        return None

    return replace_modules(model, swap)


def apply_adapter_v2(model: GPT, adapter: Adapter) -> list[str]:
    """Gives blocks a prompt, and every linear a bias and a scale, in place; norms become float32. Returns the names.

    Raises:
        InputError: see `apply_adapter`.
    """
    names = apply_adapter(model, adapter)
    for name, param in model.named_parameters():
        if is_norm(name):
            param.data = param.data.to(torch.promote_types(param.dtype, torch.float32))
    linears = replace_modules(model, lambda name, m: AdapterV2Linear(m) if hasattr(m, "in_features") else None)
    return names + linears


def is_norm(key: str) -> bool:
    return any(part.startswith(("norm", "post_norm", "ln_f")) for part in key.split("."))


def adapter_filter(key: str, value: Any = None) -> bool:
    """Whether a state dict key belongs to an adapter: these keys train and get saved."""
    return key.rsplit(".", 1)[-1].startswith("adapter_")


def adapter_v2_filter(key: str, value: Any = None) -> bool:
    return adapter_filter(key) or is_norm(key)


def mark_only_adapter_as_trainable(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        param.requires_grad = adapter_filter(name)


def mark_only_adapter_v2_as_trainable(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        param.requires_grad = adapter_v2_filter(name)
