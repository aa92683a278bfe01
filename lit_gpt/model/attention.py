"""TODO doc of model.attention"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.config import Config
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.model.norms import QK_NORMS, Clip
from lit_gpt.model.packing import Layout, Segment
from lit_gpt.model.rope import apply_rope

# What each token may look at: None is every earlier token of its row, a Layout is the earlier tokens of its own
# record, a boolean mask (T, S) says it for every position of the key-value cache.
View = Layout | torch.Tensor | None


class CausalSelfAttention(nn.Module):
    """Attention with a linear each for queries, keys, values and output, whatever the checkpoint fuses."""

    def __init__(self, config: Config, layer: int = 0) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_size, bias=config.attn_bias)
        self.k = nn.Linear(config.n_embd, config.n_query_groups * config.head_size, bias=config.attn_bias)
        self.v = nn.Linear(config.n_embd, config.n_query_groups * config.head_size, bias=config.attn_bias)
        self.proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.proj_bias)
        self.norm_q, self.norm_k = (
            QK_NORMS[config.qk_norm](config, heads) for heads in (config.n_head, config.n_query_groups)
        )
        self.norm_v = Clip(config) if config.qk_norm == "clip" else nn.Identity()
        self.window = config.window_of(layer)
        self.attention = partial(sdpa, scale=config.attn_scale)
        if config.attn_softcap:
            scale = config.attn_scale or config.head_size**-0.5
            self.attention = partial(softcapped_attention, scale=scale, cap=config.attn_softcap)
        self.kv_cache: KVCache | None = None

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        view: View = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q = apply_rope(self.split(self.norm_q(self.q(x))), cos, sin)  # (B, nh, T, hs)
        k = apply_rope(self.split(self.norm_k(self.k(x))), cos, sin)  # (B, ng, T, hs)
        v = self.split(self.norm_v(self.v(x)))
        if input_pos is not None:
            k, v = self.kv_cache(input_pos, k, v)  # (B, ng, S, hs)
        return self.proj(self.look(q, k, v, view).transpose(1, 2).flatten(2))  # (B, T, C)

    def look(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, view: View) -> torch.Tensor:
        return attend(q, k, v, view, self.window, self.attention)  # (B, nh, T, hs)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * hs) -> (B, heads, T, hs)"""
        return x.unflatten(2, (-1, self.head_size)).transpose(1, 2)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    view: View,
    window: int | None = None,
    attention: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention, (B, nh, T, hs), of each token to those it may see. The only place that knows where records begin.

    `window` limits it to the last so many tokens, itself included; a mask has that already. `attention` is `sdpa` or
    what a family has instead. Query heads of a group share their keys and values.
    """
    attention = attention or sdpa
    if isinstance(view, torch.Tensor):
        return attention(q, k, v, view)
    if view is None:
        return attention(q, k, v, band(Segment(0, q.size(2)), window, q.device))
    # split, not slices: the backward of many slices writes as many full-length gradients, that of split only one
    lengths = [segment.length for segment in view.segments]
    qs, ks, vs = (x.split(lengths, dim=2) for x in (q, k, v))
    at = {segment.start: i for i, segment in enumerate(view.segments)}  # a prefix is a segment, too
    out = []
    for i, segment in enumerate(view.segments):
        mask = band(segment, window, q.device)
        if segment.prefix_length == 0:
            out.append(attention(qs[i], ks[i], vs[i], mask))
        else:
            p = at[segment.prefix_start]
            keys, values = torch.cat((ks[p], ks[i]), dim=2), torch.cat((vs[p], vs[i]), dim=2)
            out.append(attention(qs[i], keys, values, view.mask_of(segment) if mask is None else mask))
    return torch.cat(out, dim=2)


def band(segment: Segment, window: int | None, device: torch.device) -> torch.Tensor | None:
    """What a segment sees of its prefix and itself through a sliding window, (L, P + L); None where that is all."""
    L, P = segment.length, segment.prefix_length
    if window is None or P + L <= window:
        return None
    before = torch.arange(P, P + L, device=device)[:, None] - torch.arange(P + L, device=device)
    return (before >= 0) & (before < window)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """PyTorch's attention; causal without a mask."""
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # of CUDA's fused kernels only flash knows groups, and it takes neither a mask nor float32
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)


def softcapped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, cap: float
) -> torch.Tensor:
    """Attention whose scores are cap * tanh(score / cap): Gemma 2, https://arxiv.org/abs/2408.00118. No fused kernel
    knows it, so that all (T, S) scores are held."""
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = cap * torch.tanh(q @ k.transpose(2, 3) * (scale / cap))
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v
