"""A model whose weights are split among the devices: each holds a slice of the rows of every parameter.

It is torch's `fully_shard`: a block is put together only while it is at work.

    whole           rows 0 to 7 of a weight
    device 0        rows 0 to 3                     local_tensor(param)
    device 1        rows 4 to 7
    on all          rows 0 to 7, for a moment       full_tensor(param)

Every function also takes a model that is not split, and then has nothing to do.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_gpt.errors import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.distributed.device_mesh import DeviceMesh


def shard_weights(model: nn.Module, mesh: "DeviceMesh") -> nn.Module:
    """Splits every parameter by rows, trained or frozen, quantized or not: first those of each block, then the rest.

    `mesh` has the dimension "data_parallel"; Fabric makes it.

    Raises:
        InputError: weights are quantized, and this torch cannot split codes.
    """
    from torch.distributed.fsdp import fully_shard

    check_codes_can_be_split(model)
    devices = mesh["data_parallel"]
    # a classifier holds its GPT under that name
    gpt = getattr(model, "gpt", model)
    # each block is put together and let go of by itself: all of them never are in memory at once
    for block in gpt.transformer.h:
        fully_shard(block, mesh=devices)
    return fully_shard(model, mesh=devices)  # type: ignore[return-value] # the same module, of a class that is both


def check_codes_can_be_split(model: nn.Module) -> None:
    """Raises InputError for quantized weights before torch 2.13: https://github.com/pytorch/pytorch/issues/177844"""
    major, minor = torch.__version__.split(".")[:2]
    has_codes = any(not param.is_floating_point() for param in model.parameters())
    if has_codes and (int(major), int(minor)) < (2, 13):
        raise InputError(
            f"torch {torch.__version__} cannot split quantized weights among devices. Install torch 2.13 or newer, or"
            " leave out --strategy fsdp."
        )


def is_sharded(fabric: "Fabric") -> bool:
    """Whether each process will hold only a slice of the model, so that all must take part whenever it is used."""
    from lightning_fabric.strategies import ModelParallelStrategy

    return isinstance(fabric.strategy, ModelParallelStrategy)


def loading_device(fabric: "Fabric") -> torch.device:
    """The device that weights are read to.

    Weights that will be split are read to the host's memory, by each process all of them: a single GPU may not hold
    the whole model.
    """
    if is_sharded(fabric):
        return torch.device("cpu")
    return fabric.device


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter, put together from its slices. All processes must call it."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The slice of a parameter that this process holds."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor


def sum_over_devices(fabric: "Fabric", tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors that the processes give. All processes must call it."""
    return fabric.all_reduce(tensor, reduce_op="sum")  # type: ignore[return-value] # a tensor, as it was given


def any_device(fabric: "Fabric", *flags: bool) -> list[bool]:
    """Whether each flag is set in any process. All processes must call it."""
    if fabric.world_size == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=fabric.device)
    return [count > 0 for count in sum_over_devices(fabric, counts).tolist()]


def full_parameters(model: nn.Module, keep: Callable[[str, torch.Tensor], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that `keep` chooses, one after the other, put together. All processes must go through them."""
    # after a validation `fully_shard` leaves parameters whole, in memory that it will use again: a tensor that we
    # handed out from there would change
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    for name, param in model.named_parameters():
        if keep(name, param):
            yield name, full_tensor(param).detach()


def as_weight(tensor: torch.Tensor, fabric: "Fabric") -> torch.Tensor:
    """A whole tensor as the run will hold the weights that it trains: on its device, and split if they are."""
    tensor = tensor.to(fabric.device)
    if not is_sharded(fabric):
        return tensor
    from torch.distributed.tensor import Shard, distribute_tensor

    devices = fabric.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined] # a ModelParallelStrategy
    # 0: by rows, as `fully_shard` splits them
    return distribute_tensor(tensor, devices, [Shard(0)])


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, split as `like` is."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined] # a DTensor
