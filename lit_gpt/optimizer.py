"""The optimizer of a run: any class by its path, and a trial step before anything is written."""

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_gpt.distributed import as_weight, is_sharded
from lit_gpt.errors import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class OptimizerArgs:
    """What the optimizer is made with."""

    learning_rate: float = 3e-4
    """Peak of the schedule: linear warmup, then half a cosine down to min_learning_rate at the last step."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only."""
    beta1: float = 0.9
    """AdamW's memory of the gradient, or the momentum of an optimizer that has one."""
    beta2: float = 0.95
    """AdamW's memory of its square."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise InputError(f"train.learning_rate is {self.learning_rate}, expected more than 0.")
        if self.weight_decay < 0:
            raise InputError(f"train.weight_decay is {self.weight_decay}, expected more than 0, or 0.")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise InputError(f"train.beta1 is {self.beta1} and train.beta2 {self.beta2}, expected 0 to below 1.")


def make_optimizer(model: nn.Module, args: OptimizerArgs, path: str = "torch.optim.AdamW") -> torch.optim.Optimizer:
    """An optimizer by its class path, with as many of the settings as it knows. Norms and biases, which are vectors, do
    not decay.

    Raises:
        InputError: there is no such class, or it wants something else.
    """
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
        if not issubclass(kind, torch.optim.Optimizer):
            raise TypeError(f"{name} is no optimizer")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"--optimizer {path}: {error}. Name a class by its path, such as torch.optim.AdamW or"
            " bitsandbytes.optim.PagedAdamW8bit."
        ) from None
    known, betas = inspect.signature(kind).parameters, (args.beta1, args.beta2)
    options = {"lr": args.learning_rate, "betas": betas, "weight_decay": 0.0, "momentum": args.beta1}
    options = {key: value for key, value in options.items() if key in known}
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    try:
        return kind([group for group in groups if group["params"]], **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"--optimizer {path} cannot be made with {options}: {error}.") from None


def check_optimizer(path: str, fabric: "Fabric | None" = None) -> None:
    """Takes a step with a small weight, before there are others; as they will be on the devices of a run.

    Raises:
        InputError: there is no such class, it wants other gradients, or it cannot step where weights are split.
    """
    weight, split = torch.ones(64, 64), fabric is not None and is_sharded(fabric)
    weight = nn.Parameter(weight if fabric is None else as_weight(weight, fabric))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer(nn.ParameterList([weight]), OptimizerArgs(), path)
    try:
        optimizer.step()
    except Exception as error:  # each fails in its own way
        raise InputError(
            f"--optimizer {path} cannot step{' where weights are split among devices' if split else ''}:"
            f" {str(error).strip('.!')}. Choose torch.optim.AdamW{', or another --strategy' if split else ''}."
        ) from None
