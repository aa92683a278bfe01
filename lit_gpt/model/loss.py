"""The loss: the summed cross entropy of the trained tokens, without ever holding the logits of all of them.

The legend of the shapes is in `gpt.py`."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F

# from hidden states (N, C) to logits (N, V)
Head = Callable[[torch.Tensor], torch.Tensor]


class SummedLoss(torch.autograd.Function):
    """The summed cross entropy of `head(x)`, computed with `CHUNK` rows of logits at a time.

    The logits of a long batch are its largest tensor by far. Since nothing comes after the loss, the gradient of each
    chunk is taken at once, and only the gradients of x and of the head are kept: no logits are stored, and none are
    computed twice.
    """

    CHUNK = 128  # 128 x 49,152 float32 logits are 25 MB

    @staticmethod
    def forward(ctx, head: Head, x: torch.Tensor, target: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of x (N, C) and target (N,). `trained` are the parameters of the head that train."""
        loss = x.new_zeros((), dtype=at_least_float32(x.dtype))
        x_grad = torch.zeros_like(x)
        head_grads = [torch.zeros_like(param) for param in trained]

        for start in range(0, x.size(0), SummedLoss.CHUNK):
            rows = slice(start, start + SummedLoss.CHUNK)
            # autograd is off in here; it is switched on for the one chunk, whose graph ends with its gradients
            with torch.enable_grad():
                x_rows = x[rows].detach().requires_grad_()
                chunk_loss = cross_entropy(head, x_rows, target[rows])
            x_grad[rows], *chunk_grads = torch.autograd.grad(chunk_loss, (x_rows, *trained))
            for head_grad, chunk_grad in zip(head_grads, chunk_grads, strict=True):
                head_grad += chunk_grad
            loss += chunk_loss.detach()

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
        return None, x_grad, None, *head_grads


def summed_loss(head: Head, params: Iterable[nn.Parameter], x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The sum over N targets of -log p(target), a scalar, in float32 or wider.

    Args:
        head: Makes logits (N, V) from x.
        params: The parameters that `head` uses.
        x: Hidden states, (N, C). N may be 0.
        target: The token that follows each of them, (N,).
    """
    if torch.is_grad_enabled():
        trained = [param for param in params if param.requires_grad]
        return SummedLoss.apply(head, x, target, *trained)
    chunks = zip(x.split(SummedLoss.CHUNK), target.split(SummedLoss.CHUNK), strict=True)
    return sum(cross_entropy(head, x_rows, targets) for x_rows, targets in chunks)  # type: ignore[return-value] # not 0


def cross_entropy(head: Head, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The summed cross entropy of all logits at once, a scalar, in float32 or wider."""
    logits = head(x)
    return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), target, reduction="sum")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Half precision becomes float32; float32 and float64 stay."""
    return torch.promote_types(dtype, torch.float32)
