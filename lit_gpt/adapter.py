"""LLaMA-Adapter: learn a few vectors that the upper blocks attend to besides the text. https://arxiv.org/abs/2303.16199

    y = attention(q, k, v) + g attention(q, K p, V p)      p (L, C) the prompt, g (heads) zero at the start

The prompt p of a block goes through the block's own frozen key and value projections, without a position. Its softmax
is its own, so that at g = 0 nothing has changed. Nothing is remembered between two calls: what was computed from p
before a step would be wrong after it, and p would never train.

Version 2 (https://arxiv.org/abs/2304.15010) also trains the norms, and a bias and a scale of every linear:

    y = s (W x + b)      W frozen, s (out) one and b (out) zero at the start

`apply_adapter` and `apply_adapter_v2` change a built model in place, whatever its linears are made of. `scale_adapter`
sets how much of the change is used, from 0, the base to the last bit, to 1, as trained. Of g, s, b and the weight w of
a norm it takes so much of the way from where they started:

    u g      1 + u (s - 1)      u b      w_base + u (w - w_base)          u the scale
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_gpt.errors import InputError
from lit_gpt.model.attention import CausalSelfAttention, Mask
from lit_gpt.model.gpt import GPT
from lit_gpt.ranges import check_range
from lit_gpt.replace_modules import replace_modules


@dataclass(frozen=True)
class Adapter:
    """The prompts that an adapter trains."""

    prompt_length: int = 10
    """Vectors in the prompt of each block."""
    start_layer: int = 2
    """The first block that has one; the lowest blocks are better left alone."""

    def __post_init__(self) -> None:
        check_range("--adapter.prompt_length", self.prompt_length, at_least=1)
        check_range("--adapter.start_layer", self.start_layer, at_least=0)


class AdaptedAttention(CausalSelfAttention):
    """A model's attention, with all it has under the same names, and a prompt. Prompt and gates are float32."""

    def __init__(self, attention: CausalSelfAttention, prompt_length: int) -> None:
        nn.Module.__init__(self)
        # takes over linears, norms and settings as they are: to build them again and copy would double their memory
        vars(self).update(vars(attention))
        device = next(attention.parameters()).device
        n_head = self.q.out_features // self.head_size
        # as large as what a norm gives to the same projections
        prompt = torch.randn(prompt_length, self.q.in_features, device=device, dtype=torch.float32)
        gate = torch.zeros(n_head, 1, 1, device=device, dtype=torch.float32)
        self.adapter_prompt = nn.Parameter(prompt)
        self.adapter_gate = nn.Parameter(gate)
        self.change_scale = 1.0  # how much of it is used: see `scale_adapter`

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Attention to the text, and as much of that to the prompt as the gates let through: (B, nh, T, hs)."""
        if self.change_scale == 0:
            return super().attend(q, k, v, mask)
        # keys and values of the prompt, for every row
        prompt = self.adapter_prompt.to(q.dtype)[None]  # (1, L, C)
        keys = self.split_heads(self.norm_k(self.k(prompt)))  # (1, ng, L, hs)
        values = self.split_heads(self.norm_v(self.v(prompt)))
        keys = keys.expand(q.size(0), -1, -1, -1)  # (B, ng, L, hs)
        values = values.expand(q.size(0), -1, -1, -1)

        # each token sees all of the prompt
        everything = torch.ones(q.size(2), keys.size(2), dtype=torch.bool, device=q.device)  # (T, L)
        y = self.attention_function(q, keys, values, everything, scale=self.scale, softcap=self.softcap)
        gate = (self.change_scale * self.adapter_gate).to(y.dtype)
        return super().attend(q, k, v, mask) + gate * y


class AdapterV2Linear(nn.Module):
    """A frozen linear with a trained bias and scale in float32, whatever the linear is stored in."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        # other code, such as a merge or a second walk, asks linears for these
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        device = next(linear.parameters()).device
        bias = torch.zeros(linear.out_features, device=device, dtype=torch.float32)
        scale = torch.ones(linear.out_features, device=device, dtype=torch.float32)
        self.adapter_bias = nn.Parameter(bias)
        self.adapter_scale = nn.Parameter(scale)
        self.change_scale = 1.0  # how much of it is used: see `scale_adapter`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.change_scale == 0:
            return y
        bias = self.adapter_bias
        scale = self.adapter_scale
        if self.change_scale != 1:
            bias = self.change_scale * bias
            scale = 1 + self.change_scale * (scale - 1)
        return scale.to(y.dtype) * (y + bias.to(y.dtype))


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

    def with_prompt(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, CausalSelfAttention):
            return None
        layer = int(name.split(".")[2])  # transformer.h.3.attn
        return AdaptedAttention(module, adapter.prompt_length) if layer >= adapter.start_layer else None

    return replace_modules(model, with_prompt)


def apply_adapter_v2(model: GPT, adapter: Adapter) -> list[str]:
    """Gives blocks a prompt, and every linear a bias and a scale, in place; norms become float32. Returns the names.

    Raises:
        InputError: see `apply_adapter`.
    """
    names = apply_adapter(model, adapter)

    # trained weights are float32: bfloat16 would round small updates away
    base_norms = {}
    for name, param in model.named_parameters():
        if is_norm(name):
            at_least_float32 = torch.promote_types(param.dtype, torch.float32)
            param.data = param.data.to(at_least_float32)
            base_norms[name] = param.detach().clone()
    # as they were before training, for `scale_adapter`; a dictionary is in no state dict
    model.base_norms = base_norms  # type: ignore[assignment]

    def with_bias_and_scale(name: str, module: nn.Module) -> nn.Module | None:
        # a quantized linear is no nn.Linear, but has this
        return AdapterV2Linear(module) if hasattr(module, "in_features") else None

    return names + replace_modules(model, with_bias_and_scale)


@torch.no_grad()
def scale_adapter(model: GPT, scale: float) -> None:
    """Uses so much of the change that an adapter has made: 1 is as trained, 0 is the base to the last bit.

    Norms, which version 2 trains, get other values: they can be scaled once, and do not train any longer.
    """
    for module in adapted_modules(model):
        module.change_scale = scale
    for name, base_norm in base_norms_of(model).items():
        norm = model.get_parameter(name)
        norm.data = torch.lerp(base_norm.to(norm.device), norm.data, scale)


@torch.no_grad()
def fix_adapter_scale(model: GPT) -> None:
    """Changes the trained weights such that they have the scale themselves, which is 1 again. Norms have it already."""
    for module in adapted_modules(model):
        if isinstance(module, AdaptedAttention):
            module.adapter_gate.mul_(module.change_scale)
        else:
            module.adapter_bias.mul_(module.change_scale)
            module.adapter_scale.sub_(1).mul_(module.change_scale).add_(1)
        module.change_scale = 1.0


@contextmanager
def adapter_scaled(model: GPT, scale: float) -> Iterator[None]:
    """Within it the adapter has this scale, as by `scale_adapter`; after it all is as it was, to the last bit.

    One may not stand within another, where norms are scaled.
    """
    modules = adapted_modules(model)
    scales_before = [module.change_scale for module in modules]
    norms = {name: model.get_parameter(name).data for name in base_norms_of(model)}
    scale_adapter(model, scale)
    try:
        yield
    finally:
        for module, scale_before in zip(modules, scales_before, strict=True):
            module.change_scale = scale_before
        for name, norm in norms.items():
            model.get_parameter(name).data = norm


def adapted_modules(model: GPT) -> list[AdaptedAttention | AdapterV2Linear]:
    return [module for module in model.modules() if isinstance(module, AdaptedAttention | AdapterV2Linear)]


def base_norms_of(model: GPT) -> dict[str, torch.Tensor]:
    """The norms that version 2 trains, as they were before it, by their names; none of an adapter of version 1."""
    return getattr(model, "base_norms", {})


def is_norm(key: str) -> bool:
    """Whether a state dict key belongs to a norm."""
    return any(part.startswith(("norm", "post_norm", "ln_f")) for part in key.split("."))


def adapter_filter(key: str, value: Any = None) -> bool:
    """Whether a state dict key belongs to an adapter: these keys train and get saved."""
    return key.rsplit(".", 1)[-1].startswith("adapter_")


def adapter_v2_filter(key: str, value: Any = None) -> bool:
    """Whether a state dict key belongs to an adapter of version 2, norms included."""
    return adapter_filter(key) or is_norm(key)


def mark_only_adapter_as_trainable(model: nn.Module) -> None:
    """Freezes all parameters but those of an adapter."""
    for name, param in model.named_parameters():
        param.requires_grad = adapter_filter(name)


def mark_only_adapter_v2_as_trainable(model: nn.Module) -> None:
    """Freezes all parameters but those of an adapter of version 2."""
    for name, param in model.named_parameters():
        param.requires_grad = adapter_v2_filter(name)
