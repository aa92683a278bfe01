"""An optimizer that steps in backward, so that gradients are never held together.

    after backward    g3  g3 g2  g3 g2 g1  g3 g2 g1 g0   clip, step: all gradients are alive
    in backward       g3  g2  g1  g0                     each is used as soon as it is complete, and freed

A gradient is complete when all that it comes from has been added up: that of an embedding which is the head, too, after
both. One gradient is alive at a time, or those of a block where blocks are compiled, whose backward gives all at once.

Clipping needs the norm of the whole gradient before the first weight moves. A first forward and backward pass measures
it, and a second one with the same dropout steps with what is clipped: twice the time, and the same result. Without
clipping there is one pass. The weights move in it before anybody has seen the loss, since a GPU would have to be waited
for in between. If the loss is not finite, the loop ends the run after backward, as it does where the step comes later:
nothing is saved after that, and `last` and `best` stay as they are.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lit_gpt.errors import InputError
from lit_gpt.make_optimizer import TRIAL_SETTINGS, make_optimizer
from lit_gpt.out_of_memory import explain_memory

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.model.packing import Layout


class OptimizerInBackward:
    """Steps an optimizer in backward, for each parameter by itself.

    It is one optimizer over all parameters, with the state that it always has. It skips parameters without a gradient,
    which in backward are all but one: for the 291 of an 8B model it looks 291 times at 291, which takes 15 of the 40 ms
    that these steps take a CPU, while a GPU computes for seconds.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """From now on every backward pass steps or, if there is a `max_norm`, measures; see `step`."""
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self.norms: dict[nn.Parameter, torch.Tensor] = {}  # of each gradient of the last pass, scalars
        self.total_norm: torch.Tensor | None = None  # what to clip by, during a second pass
        self.hooks = [param.register_post_accumulate_grad_hook(self.use_gradient) for param in self.params]

    def use_gradient(self, param: torch.Tensor) -> None:
        """A hook: measures the gradient of a parameter, steps if it is time to, and frees it."""
        assert param.grad is not None, "the hook is called when there is one"
        if self.total_norm is not None:
            assert self.max_norm is not None, "there is no second pass without it"
            clip_grads_with_norm_(param, self.max_norm, self.total_norm)
            self.optimizer.step()
        else:
            self.norms[param] = get_total_norm(param.grad)  # type: ignore[index] # hooked are parameters
            if self.max_norm is None:
                self.optimizer.step()
        param.grad = None

    def norm(self) -> torch.Tensor:
        """The norm of the whole gradient of the pass before, a scalar."""
        # in the optimizer's order: the sum is then rounded as `clip_grad_norm_` rounds it
        norms = [self.norms[param] for param in self.params if param in self.norms]
        return get_total_norm(norms)

    def step(self, fabric: "Fabric", model: nn.Module, batch: tuple[torch.Tensor, "Layout"], n_targets: int) -> None:
        """The second pass of a step, with the gradient clipped. Without a `max_norm` the first one has stepped.

        Args:
            fabric: Has the device.
            model: What the first pass went through.
            batch: The micro-batch of the first pass.
            n_targets: The number of its targets, by which the loss is divided.
        """
        if self.max_norm is not None:
            self.total_norm = self.norm()
            idx, layout = batch
            loss = model(idx.to(fabric.device, non_blocking=True), layout=layout.to(fabric.device))
            fabric.backward(loss / n_targets)
            self.total_norm = None
        self.norms = {}

    def remove(self) -> None:
        """From now on backward leaves gradients, as it does without an optimizer."""
        for hook in self.hooks:
            hook.remove()


def check_in_backward(path: str, fabric: "Fabric | None" = None) -> None:
    """Checks that a run can step in backward, by trial steps of its optimizer before there are weights.

    Raises:
        InputError: there are several devices, the loss is scaled for float16, or the optimizer whose class `path` names
            gives other weights if gradients come one by one.
    """
    flag = "--train.optimizer_in_backward"
    device = torch.device("cpu")
    if fabric is not None:
        device = fabric.device
        if fabric.world_size > 1:
            raise InputError(
                f"{flag} is for one device, and there are {fabric.world_size}, which exchange gradients when all are"
                " there. Leave it out, or --devices."
            )
        if fabric.strategy.precision.state_dict():
            raise InputError(
                f"{flag} steps before it is known whether a gradient overflows in float16. Leave it out, or choose"
                " --precision bf16-true, bf16-mixed or 32-true."
            )
    try:
        together = after_trial_steps(path, device, one_by_one=False)
        singly = after_trial_steps(path, device, one_by_one=True)
    except InputError:
        raise
    except Exception as error:
        if explain_memory(error) is not None:
            raise  # a card that others have filled says nothing about the optimizer
        reason = str(error).strip(".!")
        raise InputError(f"{flag}: --optimizer {path} cannot step so: {reason}. Choose torch.optim.AdamW.") from None
    if not all(map(torch.equal, together, singly)):
        raise InputError(
            f"{flag}: --optimizer {path} needs all gradients at once, and gives other weights if they come one by one."
            f" Choose torch.optim.AdamW, or leave {flag} out."
        )


def after_trial_steps(path: str, device: torch.device, one_by_one: bool) -> list[torch.Tensor]:
    """Two small weights after three steps of an optimizer, with their gradients together or one by one."""
    weights = [nn.Parameter(torch.ones(64, 64, device=device)) for _ in range(2)]
    optimizer = make_optimizer(nn.ParameterList(weights), TRIAL_SETTINGS, path)
    for step in range(3):
        for i, weight in enumerate(weights):
            weight.grad = torch.full_like(weight, 0.1 + step - 3 * i)
            if one_by_one:
                optimizer.step()
                weight.grad = None
        if not one_by_one:
            optimizer.step()
    return [weight.detach() for weight in weights]
