"""Flash attention on a CPU, for tests: PyTorch has its kernels for GPUs only."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def plain_forward(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, dropout, causal, debug, scale=None, window_size_left=-1, **others
) -> tuple[torch.Tensor, ...]:
    """What aten::_flash_attention_forward computes, in plain PyTorch: (Tq, nh, hs), and four tensors for backward."""
    weights, _, values, is_query, _ = attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size_left)
    y = torch.einsum("nhqk,nkhd->nqhd", weights, values)[is_query]
    state = torch.empty(2, dtype=torch.uint64)
    return y, q.new_zeros(q.size(1), q.size(0)).float(), state, state[0], q.new_empty(0)


def plain_backward(
    grad, q, k, v, y, lse, cu_seq_q, cu_seq_k, max_q, max_k, dropout, causal, state, unused, scale=None,
    window_size_left=-1, **others,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What aten::_flash_attention_backward computes: the gradients of q, k and v."""
    weights, (queries, keys), values, is_query, is_key = attend(
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size_left
    )
    grads = torch.zeros_like(queries)
    grads[is_query] = grad
    weight_grads = torch.einsum("nqhd,nkhd->nhqk", grads, values)
    score_grads = weights * (weight_grads - (weight_grads * weights).sum(-1, keepdim=True))
    score_grads = score_grads * (scale or q.size(-1) ** -0.5)
    q_grad = torch.einsum("nhqk,nkhd->nqhd", score_grads, keys)[is_query]
    k_grad = torch.einsum("nhqk,nqhd->nkhd", score_grads, queries)[is_key]
    v_grad = torch.einsum("nhqk,nqhd->nkhd", weights, grads)[is_key]
    # heads of queries share those of keys and values
    return q_grad, *(x.unflatten(1, (k.size(1), -1)).sum(2) for x in (k_grad, v_grad))


def attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, left) -> tuple:
    """The weights (texts, nh, max_q, max_k), queries, keys and values padded, and which of them are no padding."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    columns_q, columns_k = torch.arange(max_q), torch.arange(max_k)
    lengths_q, lengths_k = cu_seq_q.diff(), cu_seq_k.diff()
    queries = q[(cu_seq_q[:-1, None] + columns_q).clamp(max=len(q) - 1)]
    rows_k = (cu_seq_k[:-1, None] + columns_k).clamp(max=len(k) - 1)
    scores = torch.einsum("nqhd,nkhd->nhqk", queries, k[rows_k]) * (scale or q.size(-1) ** -0.5)

    # the mask is aligned to the lower right; the queries of the padding see everything, and are dropped
    distance = (lengths_k - lengths_q)[:, None, None] + columns_q[:, None] - columns_k
    is_key = columns_k < lengths_k[:, None]
    seen = (distance >= 0) & (distance <= (max_k if left < 0 else left)) & is_key[:, None]
    is_query = columns_q < lengths_q[:, None]
    scores = scores.masked_fill(~(seen | ~is_query[..., None])[:, None], -torch.inf)
    return scores.softmax(-1), (queries, k[rows_k]), v[rows_k], is_query, is_key


@contextmanager
def flash_on_a_cpu() -> Iterator[None]:
    """PyTorch has flash attention for the CPU in here."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", plain_forward, "CPU")
        library.impl("_flash_attention_backward", plain_backward, "CPU")
        yield
