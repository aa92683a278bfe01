"""The loss: the summed cross entropy of the trained tokens, without ever holding the logits of all of them.

The legend of the shapes is in `gpt.py`."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.model.fused import at_least_float32

# from hidden states (N, C) to logits (N, V)
Head = Callable[[torch.Tensor], torch.Tensor]
# from logits (N, V) and targets (N,) to the summed loss, a scalar, and the gradient of the logits: see `fused.py`
LossAndGradient = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# from logits (n, V) and targets (n,) to something of each target, (n, ...)
Judge = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SummedLoss(torch.autograd.Function):
    """The summed cross entropy of `head(x)`, computed with `n_rows` rows of logits at a time.

    The logits of a long batch are its largest tensor by far. Since nothing comes after the loss, the gradient of each
    chunk is taken at once, and only the gradients of x and of the head are kept: no logits are stored, and none are
    computed twice.
    """

    @staticmethod
    def forward(
        ctx,
        head: Head,
        loss_and_gradient: LossAndGradient,
        n_rows: int,
        x: torch.Tensor,
        target: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        """The loss, a scalar, of x (N, C) and target (N,). `trained` are the parameters of the head that train."""
        loss = x.new_zeros((), dtype=at_least_float32(x.dtype))
        x_grad = torch.zeros_like(x)
        head_grads = [torch.zeros_like(param) for param in trained]

        for rows in chunks(x.size(0), n_rows):
            # autograd is off in here; it is switched on for the one chunk, whose graph ends with its gradients
            with torch.enable_grad():
                x_rows = x[rows].detach().requires_grad_()
                logits = head(x_rows)
            chunk_loss, logits_grad = loss_and_gradient(logits.detach(), target[rows])
            x_grad[rows], *chunk_grads = torch.autograd.grad(logits, (x_rows, *trained), logits_grad)
            for head_grad, chunk_grad in zip(head_grads, chunk_grads, strict=True):
                head_grad += chunk_grad
            loss += chunk_loss

        # all that backward needs; the graphs of the chunks are gone
        ctx.save_for_backward(x_grad, *head_grads)
        return loss

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x and of the trained parameters, kept by forward, times the gradient of the loss."""

        def times_grad(kept: torch.Tensor) -> torch.Tensor:
            # the factor keeps its precision: bfloat16 would round 1 / targets by up to 0.4 %
            dtype = torch.promote_types(kept.dtype, grad.dtype)
            return (kept * grad.to(dtype)).to(kept.dtype)

        x_grad, *head_grads = map(times_grad, ctx.saved_tensors)
        return None, None, None, x_grad, None, *head_grads


def summed_loss(
    head: Head,
    loss_and_gradient: LossAndGradient,
    vocab_size: int,
    params: Iterable[nn.Parameter],
    x: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """The sum over N targets of -log p(target), a scalar, in float32 or wider.

    Args:
        head: Makes logits (N, V) from x.
        loss_and_gradient: The cross entropy of logits, with its gradient.
        vocab_size: V.
        params: The parameters that `head` uses.
        x: Hidden states, (N, C). N may be 0.
        target: The token that follows each of them, (N,).
    """
    n_rows = rows_at_once(vocab_size, x.dtype)
    if torch.is_grad_enabled():
        trained = [param for param in params if param.requires_grad]
        return SummedLoss.apply(head, loss_and_gradient, n_rows, x, target, *trained)
    loss = x.new_zeros((), dtype=at_least_float32(x.dtype))
    for rows in chunks(x.size(0), n_rows):
        logits = head(x[rows])
        loss += F.cross_entropy(logits.to(at_least_float32(logits.dtype)), target[rows], reduction="sum")
    return loss


def loss_of_each(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A `Judge`: -log p(target), (n,), in float32 or wider."""
    return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), target, reduction="none")


def judge_targets(head: Head, judge: Judge, vocab_size: int, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What `judge` makes of each of N targets, (N, ...), without the logits of all of them in memory.

    The other arguments are those of `summed_loss`.
    """
    parts = [judge(head(x[rows]), target[rows]) for rows in chunks(x.size(0), rows_at_once(vocab_size, x.dtype))]
    if not parts:  # no target
        return judge(head(x), target)
    return torch.cat(parts)


def rows_at_once(vocab_size: int, dtype: torch.dtype) -> int:
    """How many rows of logits are made at a time.

    Half precision is what GPUs compute in. There a chunk has to be large: for each the whole head is read twice from
    memory, 1 GB of it in a Llama 3 8B. A CPU gains little beyond the 2^23 logits of float32: with 49,152 tokens in the
    vocabulary 2^22 take 14 % longer, 2^24 2 % less (an EPYC of two cores).
    """
    return max(1, LOGITS[dtype] // vocab_size)


# logits of a chunk, by the dtype of the hidden states
LOGITS = {torch.bfloat16: 2**26, torch.float16: 2**26, torch.float32: 2**23, torch.float64: 2**23}


def chunks(n: int, at_most: int) -> list[slice]:
    """Slices of n rows; all but the last have `at_most`.

    So fewer rows never take more memory at once, but for a single row, and the plan of the largest micro-batch holds
    for all. Slices of one size would take less for 1.5 times `at_most` rows than for `at_most`.
    """
    starts = list(range(0, n, at_most))
    # torch.compile would make a graph of its own for a slice of one row
    if len(starts) > 1 and starts[-1] == n - 1 and at_most > 2:
        starts[-1] -= 1
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], n])]
