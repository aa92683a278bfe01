"""The small functions of a block, each as one operation whose gradient is written down.

    rms_norm        x / sqrt(mean(x^2) + eps) * weight          keeps x, and one number of each row
    rotate          rotary positions of queries and keys        keeps cosine and sine, which all blocks share
    gated           activation(gate) * up                       keeps gate and up
    low_rank_linear W x + scaling * B A x                       keeps x, and A x

Built from PyTorch's own operations, each of these makes autograd keep what is soon computed again, in float32 whatever
the model is, and read and write it several times in backward: a third of a step's memory. Here each formula stands
beside its gradient. Where no gradient is asked for, formulas run as they are. In a compiled block (`compile.py`) they
do, too: the compiler sees all of the block, makes few kernels of it, and writes its own backward.

Half precision is computed in float32, and rounded once. The legend of the shapes is in `gpt.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.model.rope import apply_spread_rope


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Half precision becomes float32; float32 and float64 stay."""
    return torch.promote_types(dtype, torch.float32)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient will be asked for, by autograd itself and not by a compiler that differentiates a block."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


# ---- norm


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, (..., C): arXiv 1910.07467

    Args:
        x: Vectors, (..., C).
        weight: (C,), in any dtype.
        eps: Added to the mean square.
        offset: 1 where the weight is the difference to one, as in Gemma.
    """
    if needs_gradient(x, weight):
        return RMSNormFunction.apply(x, weight, eps, offset)
    answers = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    if answers and offset == 0 and x.dtype == weight.dtype == torch.float32:
        # as exact, in fewer calls: for a token on a CPU 4 us, and in one call 11, where those below take 16. Answers
        # alone: a block that is computed again in backward has to have the same bits both times
        if x.numel() == x.size(-1) and x.device.type == "cpu" and eps > 0:
            length = torch.linalg.vector_norm(x).item()
            return (x * (length**2 / x.numel() + eps) ** -0.5).mul_(weight)
        return F.rms_norm(x, weight.shape, weight, eps)
    y, _ = norm_forward(x, weight, eps, offset)
    return y


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm` with n = x r, r = 1 / sqrt(mean(x^2) + eps):

    y = n w        dw = sum over rows of g n        dx = r (g w - n mean(g w n)) = r (g w - x r^2 mean(g w x))
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        # PyTorch has a kernel of its own for GPUs, which wants one dtype
        ctx.native = x.is_cuda and x.dtype == weight.dtype and offset == 0
        if ctx.native:
            y, r = torch.ops.aten._fused_rms_norm(x, list(weight.shape), weight, eps)
        else:
            y, r = norm_forward(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, r)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        needs_x, needs_weight, _, _ = ctx.needs_input_grad
        if ctx.native:
            x_grad, weight_grad = torch.ops.aten._fused_rms_norm_backward(
                grad, x, list(weight.shape), r, weight, [needs_x, needs_weight]
            )
            return x_grad, weight_grad, None, None
        x_grad = norm_backward(grad, x, weight, r, ctx.offset) if needs_x else None
        weight_grad = norm_weight_gradient(grad, x, weight, r) if needs_weight else None
        return x_grad, weight_grad, None, None


def norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x (..., C), and what each row was multiplied by for it, (..., 1)."""
    wide = x.to(at_least_float32(x.dtype))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # reads x once, and writes no squares
    r = torch.rsqrt(length.square() / x.size(-1) + eps)
    return (wide * r).mul_(norm_factor(weight, offset, wide.dtype)).to(x.dtype), r


def norm_factor(weight: torch.Tensor, offset: float, dtype: torch.dtype) -> torch.Tensor:
    """What a normed row is multiplied by, (C,). The sum is made in `dtype`, that of the arithmetic: a bfloat16
    1 + weight would lose most of a small weight."""
    factor = weight.to(dtype)
    return factor + offset if offset else factor


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, offset: float
) -> torch.Tensor:
    """The gradient of x, (..., C)."""
    g = grad * norm_factor(weight, offset, r.dtype)
    wide = x.to(g.dtype)
    inner = (g * wide).mean(-1, keepdim=True)
    return g.addcmul_(wide, inner * r.square(), value=-1).mul_(r).to(x.dtype)  # in place: g is ours alone


def norm_weight_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The gradient of the weight, (C,)."""
    products = grad * (x * r)
    return products.flatten(0, -2).sum(0).to(weight.dtype)


# ---- rotary positions


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys (B, heads, T, hs), with cosine and sine of (T, rope_n_elem) by `Rope`."""
    if needs_gradient(x):
        return RotateFunction.apply(x, cos, sin)
    return apply_spread_rope(x, cos, sin)


class RotateFunction(torch.autograd.Function):
    """`rotate`. The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return apply_spread_rope(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return apply_spread_rope(grad, cos, -sin), None, None


# ---- gated MLP


class Activation(NamedTuple):
    """An activation function and its gradient."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From the gradient of the output, and the input, to the gradient of the input."""


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(x, approximate="tanh")


def gelu_tanh_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def relu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.threshold_backward(grad, x, 0)


# `activation` in a config -> the function. ACTIVATIONS in lit_gpt/families/__init__.py has Hugging Face's names
ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_backward),
    "relu": Activation(F.relu, relu_backward),
}


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, all of one shape: arXiv 2002.05202. `activation` is a name in ACTIVATIONS."""
    if needs_gradient(gate, up):
        return GatedFunction.apply(gate, up, activation)
    return ACTIVATIONS[activation].forward(gate) * up


class GatedFunction(torch.autograd.Function):
    """`gated`. The activation is computed again in backward, which takes less time than reading it."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation].forward(gate).mul_(up)  # in place: what is multiplied is ours alone

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        activation = ACTIVATIONS[ctx.activation]
        return activation.backward(grad * up, gate), activation.forward(gate).mul_(grad), None


# ---- a linear with a low-rank change


def low_rank_linear(
    x: torch.Tensor,
    linear: nn.Module,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    x_low: torch.Tensor | None = None,
) -> torch.Tensor:
    """linear(x) + scaling * (x A^T) B^T: LoRA, arXiv 2106.09685

    Args:
        x: (..., in)
        linear: An nn.Linear, or what has an `input_gradient` of its own; see there.
        A: (r, in), in any dtype: it is computed in that of the linear's output.
        B: (out, r), likewise.
        scaling: The factor of the change.
        x_low: The input of A, (..., in), where it is not x itself: with dropout.

    Returns:
        (..., out)
    """
    # a linear whose own weights train has gradients that the function below does not know
    if needs_gradient(x, A, B) and not any(param.requires_grad for param in linear.parameters()):
        return LowRankFunction.apply(x, x_low, A, B, scaling, linear)
    y, _, _ = low_rank_forward(x, x_low, A, B, scaling, linear)
    return y


class LowRankFunction(torch.autograd.Function):
    """`low_rank_linear` over a frozen linear. With l = scaling x A^T and the gradient g of the output:

    dB = g^T l        dl = g B        dA = scaling dl^T x        dx = g W + scaling dl A
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        x_low: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        linear: nn.Module,
    ) -> torch.Tensor:
        y, rows, low = low_rank_forward(x, x_low, A, B, scaling, linear)
        ctx.save_for_backward(rows, low, A, B)
        ctx.scaling = scaling
        ctx.linear = linear
        ctx.x_shape = x.shape
        ctx.x_dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, A, B = ctx.saved_tensors
        needs_x, needs_x_low, needs_A, needs_B, _, _ = ctx.needs_input_grad
        grad = grad.flatten(0, -2)  # (N, out)
        low_grad = ctx.scaling * (grad @ B.to(grad.dtype))  # (N, r)
        A_grad = (low_grad.T @ rows).to(A.dtype) if needs_A else None
        B_grad = (grad.T @ low).to(B.dtype) if needs_B else None

        # through A go the gradients of x, or of what stands in its place
        x_grad = input_gradient(ctx.linear, grad) if needs_x else None
        x_low_grad = None
        half_A = A.to(grad.dtype)
        if needs_x_low:
            x_low_grad = (low_grad @ half_A).view(ctx.x_shape).to(ctx.x_dtype)
        elif x_grad is not None:
            x_grad.addmm_(low_grad, half_A)
        if x_grad is not None:
            x_grad = x_grad.view(ctx.x_shape).to(ctx.x_dtype)
        return x_grad, x_low_grad, A_grad, B_grad, None, None


def low_rank_forward(
    x: torch.Tensor,
    x_low: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    linear: nn.Module,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output (..., out); and, in its dtype, the rows (N, in) that A multiplied, and what B did, (N, r)."""
    y = linear(x)
    # under autocast x and y have two dtypes
    rows = (x if x_low is None else x_low).flatten(0, -2).to(y.dtype)
    low = scaling * (rows @ A.to(y.dtype).T)
    # in place: nothing else holds the linear's output, and its backward does not need it
    y.flatten(0, -2).addmm_(low, B.to(y.dtype).T)
    return y, rows, low


def input_gradient(linear: nn.Module, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of a frozen linear's input, (N, in), from that of its output, (N, out)."""
    if isinstance(linear, nn.Linear):
        return grad @ linear.weight.to(grad.dtype)
    return linear.input_gradient(grad)  # a linear of another kind knows how


# ---- loss


def loss_and_gradient(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross entropy of logits (N, V) to target (N,), a scalar, and its gradient, (N, V).

    The scalar is in float32 or wider, the gradient in the dtype of the logits: p, less one where the target is.
    """
    log_p = logits.log_softmax(-1, dtype=at_least_float32(logits.dtype))
    loss = -log_p.gather(1, target[:, None]).sum()
    if torch.compiler.is_compiling():
        # few kernels for all of it, which write nothing but the gradient
        is_target = torch.arange(logits.size(1), device=logits.device) == target[:, None]
        return loss, (log_p.exp() - is_target.to(log_p.dtype)).to(logits.dtype)
    grad = log_p.exp_()
    grad.scatter_add_(1, target[:, None], -torch.ones_like(grad[:, :1]))
    return loss, grad.to(logits.dtype)
