"""TODO doc of model.norms"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.config import Config


class RMSNorm(nn.Module):
    """https://arxiv.org/abs/1910.07467, computed in float32 at least."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype)


class GemmaRMSNorm(RMSNorm):
    """The weight is what is added to one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return ((1 + self.weight.to(y.dtype)) * y).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Weights that are trained in float32 over a model in bfloat16 are rounded as they are used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (None if param is None else param.to(x.dtype) for param in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class PerHead(nn.Module):
    """One norm for the elements of every head, (B, T, heads * hs): Qwen 3, Gemma 3."""

    def __init__(self, config: Config, heads: int) -> None:
        super().__init__()
        self.head_size, self.norm = config.head_size, NORMS[config.norm](config.head_size, eps=config.norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.unflatten(-1, (-1, self.head_size))).flatten(-2)


class EachHead(nn.Module):
    """A norm of its own for each head: StableLM 2 12B."""

    def __init__(self, config: Config, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(config.head_size, eps=config.norm_eps, bias=False) for _ in range(heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(len(self.norms), dim=-1)
        return torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], dim=-1)


class Clip(nn.Module):
    """OLMo 1 keeps queries, keys and values within bounds."""

    def __init__(self, config: Config, heads: int = 0) -> None:
        super().__init__()
        self.limit = config.clip_qkv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-self.limit, self.limit)


NORMS = {
    "RMSNorm": RMSNorm,
    "GemmaRMSNorm": GemmaRMSNorm,
    "LayerNorm": LayerNorm,
    "LayerNorm_without_bias": partial(LayerNorm, bias=False),
    "LayerNorm_without_weight": partial(LayerNorm, elementwise_affine=False),
}
QK_NORMS: dict[str | None, Callable[[Config, int], nn.Module]] = {
    None: lambda config, heads: nn.Identity(),
    "per_head": PerHead,
    "each_head": EachHead,
    "all_heads": lambda config, heads: NORMS[config.norm](heads * config.head_size, eps=config.norm_eps),
    "clip": Clip,
}
