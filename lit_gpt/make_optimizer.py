"""The optimizer of a run: any class by its path, and a trial step before anything is written."""

import inspect
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_gpt.errors import InputError
from lit_gpt.out_of_memory import explain_memory
from lit_gpt.sharding import as_weight, is_sharded

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.train import TrainArgs

# has a fused step on every kind of device, which takes weights that are split, too: SGD's does not. AdamW is an Adam
FUSED = (torch.optim.Adam,)

# for a step that is thrown away: any settings will do
TRIAL_SETTINGS: Any = SimpleNamespace(learning_rate=1e-4, weight_decay=0.01, beta1=0.9, beta2=0.95)


def make_optimizer(
    model: nn.Module, args: "TrainArgs", path: str = "torch.optim.AdamW", scales_loss: bool = False
) -> torch.optim.Optimizer:
    """The optimizer whose class `path` names, for the parameters of `model` that train.

    Args:
        model: Has the parameters.
        args: The learning rate, the weight decay and the betas.
        path: The path of the class.
        scales_loss: Whether the loss is scaled for float16. Gradients then have to be divided again before they are
            clipped, which Fabric refuses to do for a fused optimizer.

    Raises:
        InputError: there is no such class, or it wants something else.
    """
    optimizer_class = import_optimizer(path)

    # settings: as many of them as the class knows
    settings: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.beta1, args.beta2),
        "weight_decay": 0.0,
        "momentum": args.beta1,
    }
    if issubclass(optimizer_class, FUSED) and not scales_loss:
        # one pass over each parameter, and no copy of all of them for a while
        settings["fused"] = True
    accepted = inspect.signature(optimizer_class).parameters
    settings = {key: value for key, value in settings.items() if key in accepted}

    # groups: norms and biases, which are vectors, do not decay
    params = [param for param in model.parameters() if param.requires_grad]
    matrices = [param for param in params if param.ndim >= 2]
    vectors = [param for param in params if param.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]

    try:
        return optimizer_class(groups, **settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"--optimizer {path} cannot be made with {settings}: {error}.") from None


def import_optimizer(path: str) -> type[torch.optim.Optimizer]:
    """The class at a path such as torch.optim.AdamW.

    Raises:
        InputError: there is none, or it is no optimizer.
    """
    module_path, _, name = path.rpartition(".")
    try:
        optimizer_class = getattr(import_module(module_path), name)
        if not issubclass(optimizer_class, torch.optim.Optimizer):
            raise TypeError(f"{name} is no optimizer")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"--optimizer {path}: {error}. Name a class by its path, such as torch.optim.AdamW or"
            " bitsandbytes.optim.PagedAdamW8bit."
        ) from None
    return optimizer_class


def check_optimizer(path: str, fabric: "Fabric | None" = None) -> None:
    """Takes a step with a small weight, laid on the devices of a run as its weights will be, before there are others.

    Raises:
        InputError: there is no such class, it wants other gradients, or it cannot step if weights are split.
    """
    # a small weight and its gradient
    tensor = torch.ones(64, 64)
    if fabric is not None:
        tensor = as_weight(tensor, fabric)
    weight = nn.Parameter(tensor)
    weight.grad = torch.ones_like(weight)

    # a step: each optimizer fails in its own way, if it does
    optimizer = make_optimizer(nn.ParameterList([weight]), TRIAL_SETTINGS, path)
    try:
        optimizer.step()
    except Exception as error:
        if explain_memory(error) is not None:
            raise  # a card that others have filled says nothing about the optimizer
        reason = str(error).strip(".!")
        where = ""
        instead = "torch.optim.AdamW"
        if fabric is not None and is_sharded(fabric):
            where = " where weights are split among devices"
            instead += ", or another --strategy"
        raise InputError(f"--optimizer {path} cannot step{where}: {reason}. Choose {instead}.") from None
