"""A decoder-only transformer, all of it in this file. One class, many families: the config says which parts to use.

Shapes in the comments:
    B batch, T tokens of this call, S tokens to attend to, N positions with a target, V vocabulary, C n_embd,
    nh n_head, ng n_query_groups, hs head_size
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.config import Config
from lit_gpt.layout import Layout

# What each token may look at: None is every earlier token of its row, a Layout is the earlier tokens of its own
# record, a boolean mask (T, S) says it for every position of the key-value cache.
View = Layout | torch.Tensor | None


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                h=nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.n_layer)),
                ln_f=NORMS[config.norm](config.n_embd, eps=config.norm_eps),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.register_buffer("theta", rope_theta(config), persistent=False)
        self.max_seq_length = config.block_size

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        return cls(Config.from_name(name, **overrides))

    @property
    def max_seq_length(self) -> int:
        """Tokens that the key-value cache will hold. Set it before `set_kv_cache`: a short cache is a fast one."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens exceed the model's block_size, {self.config.block_size}.")
        self._max_seq_length = length

    def forward(
        self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, layout: Layout | None = None
    ) -> torch.Tensor:
        """Logits; or, with a layout, the summed loss of its targets.

        Args:
            idx: Tokens (B, T); with a layout (1, T).
            input_pos: Where in the key-value cache these tokens go, (T,). Needs `set_kv_cache` first.
            layout: Where records begin in idx, and what is trained.

        Returns:
            (B, T, V) in the model's dtype; with a layout a float32 scalar (float64 for a float64 model).

        Raises:
            ValueError: a row or a record is longer than block_size, or the cache is missing or too short.
        """
        x = self.hidden(idx, input_pos, layout)
        if layout is None:
            return self.lm_head(self.transformer.ln_f(x))
        x = x[0].index_select(0, layout.target_index)  # (N, C); its backward is three times faster than x[0, index]'s
        return summed_loss(self.lm_head, self.transformer.ln_f(x), layout.target)

    def hidden(
        self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, layout: Layout | None = None
    ) -> torch.Tensor:
        """What the blocks make of the tokens, (B, T, C), before the final norm."""
        pos, view = self.positions(idx, input_pos, layout)
        cos, sin = rope_cos_sin(self.theta, pos)  # (T, rope_n_elem / 2)
        x = self.transformer.wte(idx)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, cos, sin, view, input_pos)
        return x

    def positions(
        self, idx: torch.Tensor, input_pos: torch.Tensor | None, layout: Layout | None
    ) -> tuple[torch.Tensor, View]:
        """The rotary position of each token, (T,), and what it may look at."""
        if layout is not None:
            longest = max(segment.prefix_length + segment.length for segment in layout.segments)
            if longest > self.config.block_size:
                raise ValueError(f"A record of {longest} tokens exceeds block_size, {self.config.block_size}.")
            return layout.pos, layout
        if input_pos is None:
            if idx.size(1) > self.max_seq_length:
                raise ValueError(f"{idx.size(1)} tokens exceed max_seq_length, {self.max_seq_length}.")
            return torch.arange(idx.size(1), device=idx.device), None
        cache = self.transformer.h[0].attn.kv_cache
        if cache is None:
            raise ValueError("input_pos needs a key-value cache: call model.set_kv_cache(batch_size=...) first.")
        if idx.size(1) > cache.k.size(2):
            raise ValueError(f"{idx.size(1)} tokens exceed the key-value cache, which holds {cache.k.size(2)}.")
        return input_pos, input_pos[:, None] >= torch.arange(cache.k.size(2), device=idx.device)

    def set_kv_cache(self, batch_size: int) -> None:
        """Makes room for the keys and values of `max_seq_length` tokens."""
        weight = self.transformer.wte.weight
        shape = (batch_size, self.config.n_query_groups, self.max_seq_length, self.config.head_size)
        for block in self.transformer.h:
            block.attn.kv_cache = KVCache(shape, weight.device, weight.dtype)

    def clear_kv_cache(self) -> None:
        for block in self.transformer.h:
            block.attn.kv_cache = None


class Block(nn.Module):
    """Attention, then the MLP: Llama and most others."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.norm_2 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.mlp = MLPS[config.mlp](config)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        view: View = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + self.attn(self.norm_1(x), cos, sin, view, input_pos)
        return x + self.mlp(self.norm_2(x))


class CausalSelfAttention(nn.Module):
    """Attention with a linear each for queries, keys, values and output, whatever the checkpoint fuses."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_size, bias=config.attn_bias)
        self.k = nn.Linear(config.n_embd, config.n_query_groups * config.head_size, bias=config.attn_bias)
        self.v = nn.Linear(config.n_embd, config.n_query_groups * config.head_size, bias=config.attn_bias)
        self.proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.proj_bias)
        self.kv_cache: KVCache | None = None

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        view: View = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q = apply_rope(self.split(self.q(x)), cos, sin)  # (B, nh, T, hs)
        k = apply_rope(self.split(self.k(x)), cos, sin)  # (B, ng, T, hs)
        v = self.split(self.v(x))
        if input_pos is not None:
            k, v = self.kv_cache(input_pos, k, v)  # (B, ng, S, hs)
        y = attend(q, k, v, view)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * hs) -> (B, heads, T, hs)"""
        return x.unflatten(2, (-1, self.head_size)).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, view: View) -> torch.Tensor:
    """Scaled dot product attention, (B, nh, T, hs). The only place that knows where records begin.

    Query heads of a group share their keys and values.
    """
    if not isinstance(view, Layout):
        return sdpa(q, k, v, view)
    # split, not slices: the backward of many slices writes as many full-length gradients, that of split only one
    lengths = [segment.length for segment in view.segments]
    qs, ks, vs = (x.split(lengths, dim=2) for x in (q, k, v))
    at = {segment.start: i for i, segment in enumerate(view.segments)}  # a prefix is a segment, too
    out = []
    for i, segment in enumerate(view.segments):
        if segment.prefix_length == 0:
            out.append(sdpa(qs[i], ks[i], vs[i]))
        else:
            p = at[segment.prefix_start]
            keys, values = torch.cat((ks[p], ks[i]), dim=2), torch.cat((vs[p], vs[i]), dim=2)
            out.append(sdpa(qs[i], keys, values, view.mask_of(segment)))
    return torch.cat(out, dim=2)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """PyTorch's attention; causal without a mask."""
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # of CUDA's fused kernels only flash knows groups, and it takes neither a mask nor float32
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


class LLaMAMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


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


class KVCache(nn.Module):
    """The keys and values of the tokens so far."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    def forward(self, input_pos: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values (B, ng, T, hs), returns all of them (B, ng, S, hs)."""
        return self.k.index_copy_(2, input_pos, k.to(self.k.dtype)), self.v.index_copy_(
            2, input_pos, v.to(self.v.dtype)
        )


def rope_theta(config: Config) -> torch.Tensor:
    """One float32 frequency per pair of rotated elements, (rope_n_elem / 2,). https://arxiv.org/abs/2104.09864

    Always on the CPU, so that a model built on the meta device has them too. Written such that every bit is that of
    transformers: at position 10,000 one bit of a frequency turns a vector by 0.001.
    """
    n = config.rope_n_elem
    theta = 1.0 / config.rope_base ** (torch.arange(0, n, 2, device="cpu").float() / n)
    scaling = config.rope_scaling
    return theta if scaling is None else ROPE_SCALINGS[scaling["rope_type"]](theta, scaling)


def scale_linear(theta: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Position interpolation: all positions are pulled together. https://arxiv.org/abs/2306.15595"""
    return theta / scaling["factor"]


def scale_llama3(theta: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Stretches the waves that are longer than the original context, leaves the short ones, blends in between.

    Llama 3.1, https://arxiv.org/abs/2407.21783
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * torch.pi / theta)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * theta / scaling["factor"] + keep * theta


def rope_cos_sin(theta: torch.Tensor, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(pos.to(theta.dtype), theta)  # (T, rope_n_elem / 2)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first rope_n_elem elements of every head and leaves the rest, (B, heads, T, hs).

    Element i is paired with element i + rope_n_elem / 2, as in GPT-NeoX and all of Hugging Face's checkpoints.
    """
    n = cos.size(-1)
    x1, x2, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat(((x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest), dim=-1)


class SummedLoss(torch.autograd.Function):
    """The summed cross entropy of `head(x)`, `CHUNK` rows of logits at a time.

    The logits of a long batch are its largest tensor by far. Since nothing comes after the loss, the gradient of each
    chunk is taken at once, and only the gradients of x and of the head are kept: no logits are stored and none are
    computed twice.
    """

    CHUNK = 128  # 128 x 49,152 float32 logits are 25 MB

    @staticmethod
    def forward(ctx, head: nn.Module, x: torch.Tensor, target: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        x_grad, head_grads = torch.zeros_like(x), [torch.zeros_like(param) for param in trained]
        for start in range(0, x.size(0), SummedLoss.CHUNK):
            part = slice(start, start + SummedLoss.CHUNK)
            with torch.enable_grad():
                xs = x[part].detach().requires_grad_()
                chunk_loss = cross_entropy(head, xs, target[part])
            x_grad[part], *grads = torch.autograd.grad(chunk_loss, (xs, *trained))
            for total, part_grad in zip(head_grads, grads, strict=True):
                total += part_grad
            loss += chunk_loss.detach()
        ctx.save_for_backward(x_grad, *head_grads)
        return loss

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        # the factor keeps its precision: bfloat16 would round 1 / targets by up to 0.4 %
        x_grad, *head_grads = (
            (x * grad.to(torch.promote_types(x.dtype, grad.dtype))).to(x.dtype) for x in ctx.saved_tensors
        )
        return None, x_grad, None, *head_grads


def cross_entropy(head: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = head(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="sum")


def summed_loss(head: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over N targets of -log p(target), a scalar. x (N, C), target (N,); N may be 0."""
    if torch.is_grad_enabled():
        return SummedLoss.apply(head, x, target, *(param for param in head.parameters() if param.requires_grad))
    parts = zip(x.split(SummedLoss.CHUNK), target.split(SummedLoss.CHUNK), strict=True)
    return sum(cross_entropy(head, xs, ys) for xs, ys in parts)


BLOCKS = {"sequential": Block}
MLPS = {"LLaMAMLP": LLaMAMLP}
NORMS = {"RMSNorm": RMSNorm}
ROPE_SCALINGS = {"linear": scale_linear, "llama3": scale_llama3}
