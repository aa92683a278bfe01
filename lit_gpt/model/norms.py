"""Norms: of whole vectors (NORMS), and of the heads of queries and keys (QK_NORMS). A family names one of each.

The legend of the shapes is in `gpt.py`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.config import Config
from lit_gpt.model.fused import rms_norm


class RMSNorm(nn.Module):
    """Division by the root of the mean square, in float32 or wider: https://arxiv.org/abs/1910.07467"""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GemmaRMSNorm(RMSNorm):
    """The weight is the difference to one: Gemma."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, offset=1.0)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, with weights of any dtype: those trained in float32 over a bfloat16 model are rounded when used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class PerHead(nn.Module):
    """One norm that all heads share, over the elements of each, (B, T, heads * hs): Qwen 3, Gemma 3."""

    def __init__(self, config: Config, heads: int) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.norm = NORMS[config.norm](config.head_size, eps=config.norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_head = x.unflatten(-1, (-1, self.head_size))  # (B, T, heads, hs)
        return self.norm(by_head).flatten(-2)


class EachHead(nn.Module):
    """A norm of its own for each head, (B, T, heads * hs): StableLM 2 12B."""

    def __init__(self, config: Config, heads: int) -> None:
        super().__init__()
        norms = [LayerNorm(config.head_size, eps=config.norm_eps, bias=False) for _ in range(heads)]
        self.norms = nn.ModuleList(norms)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.chunk(len(self.norms), dim=-1)
        normed = [norm(head) for norm, head in zip(self.norms, heads, strict=True)]
        return torch.cat(normed, dim=-1)


class Clip(nn.Module):
    """Queries, keys and values are kept within bounds: OLMo 1."""

    def __init__(self, config: Config, heads: int = 0) -> None:
        super().__init__()
        self.limit = config.clip_qkv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-self.limit, self.limit)


def no_norm(config: Config, heads: int) -> nn.Module:
    """Queries and keys as they are: Llama and most others."""
    return nn.Identity()


def all_heads(config: Config, heads: int) -> nn.Module:
    """One norm over the elements of all heads together, (B, T, heads * hs): OLMo 2."""
    return NORMS[config.norm](heads * config.head_size, eps=config.norm_eps)


# `norm` in a config -> a class, called with a size and eps
NORMS: dict[str, Callable[..., nn.Module]] = {
    "RMSNorm": RMSNorm,
    "GemmaRMSNorm": GemmaRMSNorm,
    "LayerNorm": LayerNorm,
    "LayerNorm_without_bias": partial(LayerNorm, bias=False),
    "LayerNorm_without_weight": partial(LayerNorm, elementwise_affine=False),
}

# `qk_norm` in a config -> a class, called with the config and the number of heads
QK_NORMS: dict[str | None, Callable[[Config, int], nn.Module]] = {
    None: no_norm,
    "per_head": PerHead,
    "each_head": EachHead,
    "all_heads": all_heads,
    "clip": Clip,
}
