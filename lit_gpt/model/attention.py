"""Attention: which tokens each token may see, and the kernel that computes it.

    CausalSelfAttention     queries, keys, values, normed and rotated; with a cache, those of all tokens
    compute_attention       each token's attention to those it may see: the one place that chooses a kernel
    attend_by_segment       the kernel of all devices: one dense attention for each segment of a packed row
    attend_in_one_call      the kernel of CUDA in half precision: flash attention of all segments of a packed row

The legend of the shapes is in `gpt.py`."""

from functools import partial
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.config import Config
from lit_gpt.model.fused import rotate
from lit_gpt.model.kv_cache import LayerCache
from lit_gpt.model.norms import QK_NORMS, Clip
from lit_gpt.model.packing import Layout, Segment

# Which tokens each token may see. None: those before it in its row, and itself; with a cache that is one token, the
# last of all S positions. A Layout: those before it in its own record. A boolean tensor: those that are True, of all S
# positions of a key-value cache; it is (T, S), or (B, 1, T, S) if each row has positions of its own.
Mask = Layout | torch.Tensor | None


class CausalSelfAttention(nn.Module):
    """Attention with a linear each for queries, keys, values and output, even if the checkpoint fuses them."""

    def __init__(self, config: Config, layer: int = 0) -> None:
        super().__init__()
        self.head_size = config.head_size
        q_size = config.n_head * config.head_size
        kv_size = config.n_query_groups * config.head_size
        self.q = nn.Linear(config.n_embd, q_size, bias=config.attn_bias)
        self.k = nn.Linear(config.n_embd, kv_size, bias=config.attn_bias)
        self.v = nn.Linear(config.n_embd, kv_size, bias=config.attn_bias)
        self.proj = nn.Linear(q_size, config.n_embd, bias=config.proj_bias)

        # most families norm neither queries nor keys, and none but OLMo 1 touches values
        new_norm = QK_NORMS[config.qk_norm]
        self.norm_q = new_norm(config, config.n_head)
        self.norm_k = new_norm(config, config.n_query_groups)
        self.norm_v = Clip(config) if config.qk_norm == "clip" else nn.Identity()

        self.window = config.window_of(layer)
        self.scale = config.attn_scale_of(layer)
        self.softcap = config.attn_softcap or None  # a cap of 0 in somebody's config.json means none
        # a part like the linears, for which `compile.py` puts in one that a graph can hold
        self.attention_function: Kernel = compute_attention

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask = None,
        input_pos: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). With a cache, `input_pos`, (T,) or (B, T), says where in its rows the tokens go."""
        q, k, v = self.heads(x, cos, sin)  # (B, nh, T, hs), and (B, ng, T, hs) of both others

        # keys are cached as they are rotated: a token's position never changes
        if cache is not None:
            k, v = cache.update(input_pos, k, v)  # (B, ng, S, hs)

        y = self.attend(q, k, v, mask)  # (B, nh, T, hs)
        y = y.transpose(1, 2).flatten(2)  # (B, T, nh * hs)
        return self.proj(y)

    def heads(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, nh, T, hs), keys and values (B, ng, T, hs) of x (B, T, C): normed, and rotated but for values.

        What computes them by other linears overrides this: `fast_linears.py` has one for all three.
        """
        return self.normed_and_rotated(self.q(x), self.k(x), self.v(x), cos, sin)

    def normed_and_rotated(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same from what the linears give: queries (B, T, nh * hs), keys and values (B, T, ng * hs)."""
        q = self.split_heads(self.norm_q(q))
        k = self.split_heads(self.norm_k(k))
        v = self.split_heads(self.norm_v(v))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Attention of queries (B, nh, T, hs) to keys and values (B, ng, S, hs): (B, nh, T, hs).

        A method that adds something to attention overrides this: the adapters add their prompt here.
        """
        return self.attention_function(q, k, v, mask, window=self.window, scale=self.scale, softcap=self.softcap)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * hs) -> (B, heads, T, hs)"""
        return x.unflatten(2, (-1, self.head_size)).transpose(1, 2)


class Kernel(Protocol):
    """A function that computes attention, differentiable unless gradients are off.

    It asks for no value of a tensor: what it needs to know is in shapes, in Python integers and in these arguments.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        *,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Returns (B, nh, T, hs) in the dtype of q.

        Args:
            q: Queries, (B, nh, T, hs).
            k: Keys, (B, ng, S, hs). Each nh / ng heads of queries, in order, share a head of keys and values.
            v: Values, (B, ng, S, hs).
            mask: None, with S = T, or of one token that comes after S - 1 others. A Layout, with S = T, or more if its
                segments continue what stands behind the row's own keys; a loop uses its `segments`, and one fused call
                its `varlen`. Or a tensor, which has the window in it.
            window: A token sees the last so many, itself included. None: all.
            scale: The factor of the scores. None: 1 / sqrt(hs).
            softcap: Scores become softcap * tanh(score / softcap). None: they stay.
        """


def compute_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention, (B, nh, T, hs), of each token to those it may see; see `Kernel`.

    This is the one place where a kernel is chosen, by device, dtype and mask. To add one, write a function with the
    signature of `Kernel`.
    """
    if takes_one_call(mask, q, softcap):
        return attend_in_one_call(q, k, v, mask, window=window, scale=scale)
    return attend_by_segment(q, k, v, mask, window=window, scale=scale, softcap=softcap)


def attend_by_segment(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The kernel of all devices; see `Kernel`. A packed row is one dense attention for each of its segments.

    On a CPU one call for all of them, padded, is no faster: with 32 records of 22 to 66 tokens after a shared prefix it
    takes 1.1 times as long, forward and backward, and so do batched products with the softmax between.
    """
    # how one segment is computed; a family has a cap or has none, so that this is the same in every call
    dense = partial(sdpa, scale=scale)
    if softcap is not None:
        dense = partial(softcapped_attention, scale=scale, softcap=softcap)

    # one text per row, with a cache or without
    if isinstance(mask, torch.Tensor):
        return dense(q, k, v, mask)
    if mask is None:
        row = Segment(start=0, length=q.size(2), prefix_length=k.size(2) - q.size(2))
        return dense(q, k, v, sliding_window_mask(row, window, q.device))

    # split, not slices: the backward of many slices writes as many full-length gradients, that of split only one
    lengths = [segment.length for segment in mask.segments]
    n_before = k.size(2) - q.size(2)  # keys behind those of the row itself: what a cache has of the texts
    queries = q.split(lengths, dim=2)
    keys = k.split([*lengths, n_before], dim=2)
    values = v.split([*lengths, n_before], dim=2)

    # a segment sees itself and the prefix that it continues: an earlier segment of the row with all that this one sees,
    # or what stands behind the row
    prefix_starts = {segment.prefix_start for segment in mask.segments if segment.prefix_length}
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keys and values, by where a segment begins
    outputs = []
    for i, segment in enumerate(mask.segments):
        all_keys, all_values = keys[i], values[i]
        segment_mask = sliding_window_mask(segment, window, q.device)
        if segment.prefix_length:
            if segment.prefix_start < q.size(2):
                prefix_keys, prefix_values = seen[segment.prefix_start]
            else:
                prefix_keys = k.narrow(2, segment.prefix_start, segment.prefix_length)
                prefix_values = v.narrow(2, segment.prefix_start, segment.prefix_length)
            all_keys = torch.cat((prefix_keys, all_keys), dim=2)
            all_values = torch.cat((prefix_values, all_values), dim=2)
            if segment_mask is None:
                segment_mask = mask.mask_of(segment)
        if segment.start in prefix_starts:
            seen[segment.start] = all_keys, all_values
        outputs.append(dense(queries[i], all_keys, all_values, segment_mask))
    return torch.cat(outputs, dim=2)


def takes_one_call(mask: Mask, q: torch.Tensor, softcap: float | None) -> TypeGuard[Layout]:
    """Whether all records of a packed row are one call of flash attention, which knows no soft cap."""
    return isinstance(mask, Layout) and softcap is None and has_flash_attention(q)


def has_flash_attention(q: torch.Tensor) -> bool:
    """Whether flash attention for records of many lengths knows this device, this dtype and this size of heads."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_size = q.size(-1)
    return head_size % 8 == 0 and head_size <= 256 and is_ampere_or_newer(q.device)


def is_ampere_or_newer(device: torch.device) -> bool:
    """Whether an NVIDIA GPU is of the first generation with bfloat16, compute capability 8.0, or of a later one."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend_in_one_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Layout,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """All segments of a packed row in one call of flash attention; see `Kernel`. It has no soft cap.

    The loop over segments makes some ten launches for each segment and layer, this one three for each layer.
    """
    index = mask.varlen
    q = q[0].transpose(0, 1)  # (T, nh, hs)
    k = k[0].transpose(0, 1)  # (T, ng, hs)
    v = v[0].transpose(0, 1)
    if index.key_index is not None:  # each segment gets a copy of the prefix that it continues
        k = gather_rows(k, index.key_index)
        v = gather_rows(v, index.key_index)
    y = FlashFunction.apply(
        q,
        k,
        v,
        index.cu_seqlens_q,
        index.cu_seqlens_k,
        index.max_seqlen_q,
        index.max_seqlen_k,
        -1 if window is None else window - 1,  # how far a token sees to its left; -1 is without an end
        scale,
    )
    return y.transpose(0, 1)[None]


class FlashFunction(torch.autograd.Function):
    """Causal flash attention within texts of many lengths that lie end to end: https://arxiv.org/abs/2307.08691

    `torch.nn.attention.varlen.varlen_attn` calls the same two operations. It is written in Python and costs the host
    more time than all else in a layer, and its signature is another one in each of torch 2.10, 2.11 and 2.12.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        left: int,
        scale: float | None,
    ) -> torch.Tensor:
        """Queries (Tq, nh, hs), keys and values (Tk, ng, hs), where each text begins, and the longest one's length.

        A token sees `left` tokens before it (all, if -1) and itself.
        """
        y, logsumexp, _, _, _ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            0.0,  # dropout
            left == -1,  # causal and no more
            False,  # for tests of dropout
            scale=scale,
            window_size_left=left,
            window_size_right=0,
        )
        ctx.save_for_backward(q, k, v, y, logsumexp, cu_seqlens_q, cu_seqlens_k)
        ctx.settings = (max_seqlen_q, max_seqlen_k, left, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, y, logsumexp, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        max_seqlen_q, max_seqlen_k, left, scale = ctx.settings
        random_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
        q_grad, k_grad, v_grad = torch.ops.aten._flash_attention_backward(
            grad.contiguous(),
            q,
            k,
            v,
            y,
            logsumexp,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            0.0,
            left == -1,
            random_state,
            random_state,
            scale=scale,
            window_size_left=left,
            window_size_right=0,
        )
        return q_grad, k_grad, v_grad, None, None, None, None, None, None


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of keys or values, (T, ng, hs) -> (len(index), ng, hs).

    The gradients of a prefix are added up over all records that share it: backward of an embedding does so in float32,
    that of an index in the dtype of x, with an order that changes.
    """
    rows = F.embedding(index, x.flatten(1))
    return rows.unflatten(1, x.shape[1:])


def sliding_window_mask(segment: Segment, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The tokens of its prefix and itself that a segment sees through a window, (L, P + L).

    None if the window leaves nothing out.
    """
    P = segment.prefix_length
    S = P + segment.length
    if window is None or window >= S:
        return None
    # how many tokens a key (column) stands before a query (row), if both are numbered from the prefix on
    distance = torch.arange(P, S, device=device)[:, None] - torch.arange(S, device=device)
    return (distance >= 0) & (distance < window)


def cache_masks(input_pos: torch.Tensor, length: int, windows: set[int | None]) -> dict[int | None, Mask]:
    """The positions of a cache that tokens at `input_pos` may see, for every size of sliding window: (T, S) for
    positions (T,), and (B, 1, T, S) for those of each row, (B, T).

    `length` is S. Positions that no token has filled come after all tokens, and are not seen.
    """
    if input_pos.dim() == 2:
        input_pos = input_pos[:, None]  # (B, 1, T): the same for all heads
    distance = input_pos[..., None] - torch.arange(length, device=input_pos.device)
    masks: dict[int | None, Mask] = {}
    for window in windows:
        if window is None:
            masks[window] = distance >= 0
        else:
            masks[window] = (distance >= 0) & (distance < window)
    return masks


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Dense attention by PyTorch's kernels: (B, nh, T, hs). Without a mask it is causal, and one token sees all."""
    if q.size(2) == 1:
        # one token: the heads that share keys and values are rows of one product, and nothing is repeated for them
        rows = q.unflatten(1, (k.size(1), -1)).squeeze(3)  # (B, ng, nh / ng, hs)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).flatten(1, 2).unsqueeze(2)
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # of CUDA's fused kernels only flash attention knows groups, and it takes neither a mask nor float32
        k = repeat_groups(k, q.size(1))
        v = repeat_groups(v, q.size(1))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )


def softcapped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float,
) -> torch.Tensor:
    """Dense attention whose scores are softcap * tanh(score / softcap): Gemma 2, https://arxiv.org/abs/2408.00118

    PyTorch's kernels have no cap, so that all scores, (B, nh, T, S), are in memory.
    """
    if scale is None:
        scale = q.size(-1) ** -0.5
    if mask is None:
        T, S = q.size(2), k.size(2)
        everything = torch.ones(T, S, dtype=torch.bool, device=q.device)
        mask = everything.tril(S - T)
    k = repeat_groups(k, q.size(1))
    v = repeat_groups(v, q.size(1))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
    scores = scores.masked_fill(~mask, -torch.inf)
    # in float32, as in transformers' Gemma 2
    at_least_float32 = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=at_least_float32).to(q.dtype)
    return weights @ v


def repeat_groups(x: torch.Tensor, n_head: int) -> torch.Tensor:
    """Keys or values (B, ng, S, hs) once for each head of queries: (B, nh, S, hs)"""
    return x.repeat_interleave(n_head // x.size(1), dim=1)
