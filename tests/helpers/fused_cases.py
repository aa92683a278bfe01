"""The small functions of lit_gpt/model/fused.py beside formulas of PyTorch's operations one by one, for tests."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.model import fused
from lit_gpt.model.rope import spread

T, C = 23, 32


class Case(NamedTuple):
    """A function, what it should compute, and the shapes of its inputs, all of which get a gradient."""

    function: Callable[..., Any]
    expected: Callable[..., Any]
    shapes: list[tuple[int, ...]]
    constants: list[Any] = []


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    return x / (x**2).mean(-1, keepdim=True).add(eps).sqrt() * (offset + weight)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """By complex numbers, from cosine and sine of all elements, as `Rope` gives them."""
    n = cos.size(-1) // 2
    turned = torch.complex(x[..., :n], x[..., n : 2 * n]) * torch.complex(cos[..., :n], sin[..., n:])
    return torch.cat((turned.real, turned.imag, x[..., 2 * n :]), dim=-1)


def both_rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rotated(q, cos, sin), rotated(k, cos, sin)


def rotate_both(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return fused.rotate(q, cos, sin), fused.rotate(k, cos, sin)


def gated_by(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda gate, up, name: activation(gate) * up


def low_rank(x, A, B, x_low, scaling, weight, bias) -> torch.Tensor:
    return fused.low_rank_linear(x, linear_of(weight, bias), A, B, scaling, x_low)


def low_rank_formula(x, A, B, x_low, scaling, weight, bias) -> torch.Tensor:
    return F.linear(x, weight.to(x), bias.to(x)) + scaling * ((x if x_low is None else x_low) @ A.T @ B.T)


def linear_of(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.size(1), weight.size(0), device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers in float64, made on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ANGLES = torch.linspace(0, 50, T, dtype=torch.float64)[:, None] * torch.linspace(0.01, 1, 6, dtype=torch.float64)
ROTATIONS = list(spread(ANGLES.cos(), ANGLES.sin()))
LINEAR = [random(40, C, seed=7), random(40, seed=8)]
HEADS = [(2, 4, T, 16), (2, 2, T, 16)]

CASES = {
    "norm": Case(fused.rms_norm, norm, [(2, T, C), (C,)], [1e-5]),
    "norm of heads": Case(fused.rms_norm, norm, [(2, T, 4, C), (C,)], [1e-6]),
    "norm of Gemma": Case(fused.rms_norm, norm, [(2, T, C), (C,)], [1e-5, 1.0]),
    "rotations": Case(rotate_both, both_rotated, HEADS, ROTATIONS),
    "rotations of all elements": Case(rotate_both, both_rotated, [(1, 3, T, 12), (1, 1, T, 12)], ROTATIONS),
    "silu": Case(fused.gated, gated_by(lambda x: x * torch.sigmoid(x)), [(2, T, C)] * 2, ["silu"]),
    "gelu": Case(fused.gated, gated_by(F.gelu), [(2, T, C)] * 2, ["gelu"]),
    "gelu_tanh": Case(fused.gated, gated_by(lambda x: F.gelu(x, approximate="tanh")), [(2, T, C)] * 2, ["gelu_tanh"]),
    "relu": Case(fused.gated, gated_by(lambda x: x.clamp(min=0)), [(2, T, C)] * 2, ["relu"]),
    "low rank": Case(
        lambda x, A, B, *more: low_rank(x, A, B, None, *more),
        lambda x, A, B, *more: low_rank_formula(x, A, B, None, *more),
        [(2, T, C), (4, C), (40, 4)],
        [2.5, *LINEAR],
    ),
    "low rank with dropout": Case(low_rank, low_rank_formula, [(2, T, C), (4, C), (40, 4), (2, T, C)], [2.5, *LINEAR]),
}


def results(function: Callable[..., Any], inputs: list[torch.Tensor], constants: list[Any]) -> list[torch.Tensor]:
    """What a function returns for inputs and constants, and the gradients of all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs, *constants)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    grads = [random(*y.shape, seed=100 + i).to(y) for i, y in enumerate(outputs)]
    return outputs + list(torch.autograd.grad(outputs, inputs, grads))


def inputs_of(case: Case) -> list[torch.Tensor]:
    return [random(*shape, seed=i) for i, shape in enumerate(case.shapes)]
