"""A decoder-only transformer. One class, many families: the config says which parts to use.

Shapes in the comments:
    B batch, T tokens of this call, S tokens to attend to, N positions with a target, V vocabulary, C n_embd,
    nh n_head, ng n_query_groups, hs head_size
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.config import Config
from lit_gpt.layout import Layout, Segment
from lit_gpt.rope import Rope, apply_rope

# What each token may look at: None is every earlier token of its row, a Layout is the earlier tokens of its own
# record, a boolean mask (T, S) says it for every position of the key-value cache.
View = Layout | torch.Tensor | None
Head = Callable[[torch.Tensor], torch.Tensor]


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=EMBEDDINGS[config.embedding](config),
                h=nn.ModuleList(BLOCKS[config.block](config, layer) for layer in range(config.n_layer)),
                ln_f=NORMS[config.norm](config.n_embd, eps=config.norm_eps),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.cap = SoftCap(config.final_softcap) if config.final_softcap else Scale(config.logit_scale)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.ropes = nn.ModuleDict({kind: Rope(config, kind) for kind in {block.rope for block in self.transformer.h}})
        self.windows = {block.attn.window for block in self.transformer.h}
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
            return self.logits(self.transformer.ln_f(x))
        x = x[0].index_select(0, layout.target_index)  # (N, C); its backward is three times faster than x[0, index]'s
        return summed_loss(self.logits, self.lm_head.parameters(), self.transformer.ln_f(x), layout.target)

    def hidden(
        self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, layout: Layout | None = None
    ) -> torch.Tensor:
        """What the blocks make of the tokens, (B, T, C), before the final norm."""
        pos, lengths, views = self.positions(idx, input_pos, layout)
        turns = {kind: rope(pos, lengths) for kind, rope in self.ropes.items()}  # cos and sin, (T, rope_n_elem / 2)
        x = self.transformer.wte(idx, pos)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, *turns[block.rope], views[block.window], input_pos)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.cap(self.lm_head(x))

    def positions(
        self, idx: torch.Tensor, input_pos: torch.Tensor | None, layout: Layout | None
    ) -> tuple[torch.Tensor, list[tuple[int, int]], dict[int | None, View]]:
        """The position of each token, (T,); how many tokens belong to records of which length; what each may look at,
        for every size of sliding window."""
        if layout is not None:
            lengths = [(segment.length, segment.prefix_length + segment.length) for segment in layout.segments]
            longest = max(length for _, length in lengths)
            if longest > self.config.block_size:
                raise ValueError(f"A record of {longest} tokens exceeds block_size, {self.config.block_size}.")
            return layout.pos, lengths, dict.fromkeys(self.windows, layout)
        T = idx.size(1)
        if input_pos is None:
            if T > self.max_seq_length:
                raise ValueError(f"{T} tokens exceed max_seq_length, {self.max_seq_length}.")
            return torch.arange(T, device=idx.device), [(T, T)], dict.fromkeys(self.windows)
        cache = self.transformer.h[0].attn.kv_cache
        if cache is None:
            raise ValueError("input_pos needs a key-value cache: call model.set_kv_cache(batch_size=...) first.")
        S = cache.k.size(2)
        if T > S:
            raise ValueError(f"{T} tokens exceed the key-value cache, which holds {S}.")
        before = input_pos[:, None] - torch.arange(S, device=idx.device)  # (T, S)
        masks = {w: before >= 0 if w is None else (before >= 0) & (before < w) for w in self.windows}
        return input_pos, [(T, S)], masks

    def set_kv_cache(self, batch_size: int) -> None:
        """Makes room for the keys and values of `max_seq_length` tokens."""
        weight = self.transformer.wte.weight
        shape = (batch_size, self.config.n_query_groups, self.max_seq_length, self.config.head_size)
        for block in self.transformer.h:
            block.attn.kv_cache = KVCache(shape, weight.device, weight.dtype)

    def clear_kv_cache(self) -> None:
        for block in self.transformer.h:
            block.attn.kv_cache = None


def count_parameters(config: Config) -> int:
    """How many a model has: of its layers one of each kind is built, on the meta device."""
    with torch.device("meta"):
        parts = [(1, GPT(config.replace(n_layer=0)))]
        for dense in (False, True):
            layers = [layer for layer in range(config.n_layer) if (layer in config.dense_layers) == dense]
            parts += [(len(layers), BLOCKS[config.block](config, layer)) for layer in layers[:1]]
    return sum(n * param.numel() for n, part in parts for param in part.parameters())


class Block(nn.Module):
    """Attention, then the MLP, each on the normed sum of all before: Llama and most others."""

    def __init__(self, config: Config, layer: int = 0) -> None:
        super().__init__()
        self.norm_1 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.norm_2 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.mlp = MLPS["LLaMAMLP" if layer in config.dense_layers else config.mlp](config)
        self.rope, self.window = config.rope_of(layer), self.attn.window

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). `where` the tokens are, and what they may look at, is for attention to know."""
        x = x + self.attn(self.norm_1(x), *where)
        return x + self.mlp(self.norm_2(x))


class ScaledBlock(Block):
    """What a block adds is scaled: Granite."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.scale = config.residual_scale

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        x = x + self.scale * self.attn(self.norm_1(x), *where)
        return x + self.scale * self.mlp(self.norm_2(x))


class ParallelBlock(Block):
    """Attention and MLP side by side, each with its norm: GPT-NeoX, Falcon 40B."""

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        return x + self.attn(self.norm_1(x), *where) + self.mlp(self.norm_2(x))


class SharedNormBlock(Block):
    """Attention and MLP side by side on one normed input: Phi, Falcon 7B, StableLM 2 12B."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        del self.norm_2

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        normed = self.norm_1(x)
        return x + self.attn(normed, *where) + self.mlp(normed)


class PostNormBlock(Block):
    """The norms come after: OLMo 2."""

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        x = x + self.norm_1(self.attn(x, *where))
        return x + self.norm_2(self.mlp(x))


class SandwichBlock(Block):
    """Norms before and after: Gemma 2 and 3."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.post_norm_1 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.post_norm_2 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        x = x + self.post_norm_1(self.attn(self.norm_1(x), *where))
        return x + self.post_norm_2(self.mlp(self.norm_2(x)))


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


class Embedding(nn.Embedding):
    def __init__(self, config: Config) -> None:
        super().__init__(config.padded_vocab_size, config.n_embd)

    def forward(self, idx: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(idx)


class ScaledEmbedding(Embedding):
    """Gemma, Granite. The factor is rounded to the weights' dtype, as it was in training."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = config.embedding_scale

    def forward(self, idx: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        x = super().forward(idx)
        return x * torch.tensor(self.scale, dtype=x.dtype, device="cpu").to(x.device)


class PositionEmbedding(Embedding):
    """A learned vector per position is added: GPT-2."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, idx: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(idx) + self.positions(pos)


class Scale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class SoftCap(nn.Module):
    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(x / self.cap)


class LLaMAMLP(nn.Module):
    """Gated: https://arxiv.org/abs/2002.05202"""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        size = intermediate_size or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.proj = nn.Linear(size, config.n_embd, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.activation(self.fc_1(x)) * self.fc_2(x))


class GptNeoxMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.activation(self.fc(x)))


class LLaMAMoE(nn.Module):
    """Each token goes through the few experts that a router gives it: Mixtral, https://arxiv.org/abs/2401.04088

    The experts are linears like any other, so that LoRA and quantization see them. Their shares of the tokens are
    known to the device alone: fetching them is the one place where `forward` waits for it, once per layer.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(LLaMAMLP(config, config.moe_intermediate_size) for _ in range(config.n_expert))
        self.n_chosen, self.renormalize = config.n_expert_per_token, config.renormalize_experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)  # (T, C)
        scores = self.gate(flat).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, chosen = scores.topk(self.n_chosen)  # (T, n_chosen)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # the tokens of expert 0, then those of 1 ...
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = flat.index_select(0, order // self.n_chosen).split(counts)
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        done = done * weights.flatten().index_select(0, order)[:, None].to(x.dtype)
        return torch.zeros_like(flat).index_add(0, order // self.n_chosen, done).view_as(x)


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


class SummedLoss(torch.autograd.Function):
    """The summed cross entropy of `head(x)`, `CHUNK` rows of logits at a time.

    The logits of a long batch are its largest tensor by far. Since nothing comes after the loss, the gradient of each
    chunk is taken at once, and only the gradients of x and of the head are kept: no logits are stored and none are
    computed twice.
    """

    CHUNK = 128  # 128 x 49,152 float32 logits are 25 MB

    @staticmethod
    def forward(ctx, head: Head, x: torch.Tensor, target: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
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


def cross_entropy(head: Head, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = head(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="sum")


def summed_loss(head: Head, params: Iterable[nn.Parameter], x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over N targets of -log p(target), a scalar. x (N, C), target (N,); N may be 0.

    `head` makes logits (N, V) with `params`.
    """
    if torch.is_grad_enabled():
        return SummedLoss.apply(head, x, target, *(param for param in params if param.requires_grad))
    parts = zip(x.split(SummedLoss.CHUNK), target.split(SummedLoss.CHUNK), strict=True)
    return sum(cross_entropy(head, xs, ys) for xs, ys in parts)


EMBEDDINGS = {"plain": Embedding, "scaled": ScaledEmbedding, "positions": PositionEmbedding}
BLOCKS = {
    "sequential": Block,
    "scaled": ScaledBlock,
    "parallel": ParallelBlock,
    "shared_norm": SharedNormBlock,
    "post_norm": PostNormBlock,
    "sandwich": SandwichBlock,
}
MLPS = {"LLaMAMLP": LLaMAMLP, "GptNeoxMLP": GptNeoxMLP, "LLaMAMoE": LLaMAMoE}
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
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
