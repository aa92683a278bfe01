"""TODO doc of model.loss"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F

Head = Callable[[torch.Tensor], torch.Tensor]


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
