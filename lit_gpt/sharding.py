"""A model whose weights are split among the devices: each holds a slice of the rows of every parameter.

It is torch's `fully_shard`: a block is put together only while it is at work.

    whole           rows 0 to 7 of a weight
    device 0        rows 0 to 3                     local_tensor(param)
    device 1        rows 4 to 7
    on all          rows 0 to 7, for a moment       full_tensor(param)

A model goes through three states:

    build_model             no weights: parameters of the meta device
    load_weights            each process has read its own rows (`own_rows`): parameters are torch's DTensors of them, so
                            that no process ever holds a whole model. Surgeons change it in this state
    split_among_devices     `fully_shard` has taken over those rows, and the model computes. All processes must call it

Every function also takes a model that is not split, and then has nothing to do.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_gpt.errors import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.distributed.device_mesh import DeviceMesh

SPLIT_FLAG = "--strategy fsdp"  # what a user types for it


def split_among_devices(fabric: "Fabric", model: nn.Module) -> None:
    """Splits the weights of a model, in place, if the strategy of the run says so. All processes must call it."""
    if is_sharded(fabric):
        shard_weights(model, fabric.strategy.device_mesh)  # type: ignore[attr-defined] # a ModelParallelStrategy


def shard_weights(model: nn.Module, mesh: "DeviceMesh") -> nn.Module:
    """Splits every parameter by rows, trained or frozen, quantized or not: first those of each block, then the rest.

    `mesh` has the dimension "data_parallel"; Fabric makes it. A model that is split already stays as it is.

    Raises:
        InputError: weights are quantized, and this torch cannot split codes.
    """
    from torch.distributed.fsdp import fully_shard

    if computes_split(model):
        let_go_of_wholes(model)  # it may have answered: `fit` is about to ask for its parameters
        return model
    check_codes_can_be_split(model)
    rows_of_params = take_out_rows(model)
    devices = mesh["data_parallel"]
    # a classifier holds its GPT under that name
    gpt = getattr(model, "gpt", model)
    # each block is put together and let go of by itself: all of them never are in memory at once
    for block in gpt.transformer.h:
        fully_shard(block, mesh=devices)
    sharded = fully_shard(model, mesh=devices)
    put_rows_in(rows_of_params)
    return sharded  # type: ignore[return-value] # the same module, of a class that is both


def computes_split(model: nn.Module) -> bool:
    """Whether `shard_weights` has split a model, so that all processes must take part whenever it computes."""
    return hasattr(model, "reshard")


Place = tuple[nn.Module, str]  # a module, and the name that it has for one of its parameters


def take_out_rows(model: nn.Module) -> list[tuple[Place, nn.Parameter]]:
    """Puts parameters of the meta device in the places of those that hold this process' rows, and returns these.

    `fully_shard` takes a parameter that is a DTensor for one that is split in another way, which it would split once
    more. From the meta device it learns the shapes alone.
    """
    taken = []
    empty: dict[int, nn.Parameter] = {}  # by the id of what it stands for: a tied head and its embedding stay one
    for module in list(model.modules()):
        for name, param in list(module.named_parameters(recurse=False)):
            if not hasattr(param, "device_mesh"):
                continue
            if id(param) not in empty:
                shape = torch.empty(param.shape, dtype=param.dtype, device="meta")
                empty[id(param)] = nn.Parameter(shape, requires_grad=param.requires_grad)
            setattr(module, name, empty[id(param)])
            taken.append(((module, name), param))
    return taken


def put_rows_in(rows_of_params: list[tuple[Place, nn.Parameter]]) -> None:
    """The inverse of `take_out_rows`, for a model that `fully_shard` has split by its shapes.

    `fully_shard` looks for the parameters of its modules anew before it first computes, as after a
    `load_state_dict(assign=True)`.
    """
    for (module, name), param in rows_of_params:
        setattr(module, name, param)


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


def mesh_of(fabric: "Fabric") -> "DeviceMesh | None":
    """The devices that split the weights among them, for `load_weights`; None if each has a copy of them."""
    if not is_sharded(fabric):
        return None
    return fabric.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined] # a ModelParallelStrategy


def mesh_of_model(model: nn.Module) -> "DeviceMesh | None":
    """The devices among which the weights of a model are split; None if they are not."""
    let_go_of_wholes(model)
    meshes = [param.device_mesh for param in model.parameters() if hasattr(param, "device_mesh")]
    return meshes[0] if meshes else None


def own_rows(n_rows: int, mesh: "DeviceMesh") -> slice:
    """The rows that this process keeps of a tensor of `n_rows`: equal slices, but for the last ones; maybe none."""
    size = -(n_rows // -mesh.size())
    begin = min(n_rows, size * mesh.get_local_rank())
    end = min(n_rows, begin + size)
    return slice(begin, end)


def as_slice(rows: torch.Tensor, n_rows: int, mesh: "DeviceMesh") -> torch.Tensor:
    """A tensor of `n_rows`, split among the devices, of which this process has `rows`; see `own_rows`."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((n_rows, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    # 0: by rows, as `fully_shard` splits them. Nothing is sent, since all know what the others have
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def slice_of(tensor: torch.Tensor, mesh: "DeviceMesh", device: torch.device | None = None) -> torch.Tensor:
    """A whole tensor, which every process has, split among the devices: a copy of its own rows. Nothing is sent."""
    rows = tensor[own_rows(len(tensor), mesh)]
    return as_slice(rows.to(device, copy=True), len(tensor), mesh)


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


def all_processes_are_here() -> None:
    """Waits until all processes of the run have come here; nothing if this is the only one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def any_device(fabric: "Fabric", *flags: bool) -> list[bool]:
    """Whether each flag is set in any process. All processes must call it."""
    if fabric.world_size == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=fabric.device)
    return [count > 0 for count in sum_over_devices(fabric, counts).tolist()]


def full_parameters(model: nn.Module, keep: Callable[[str, torch.Tensor], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that `keep` chooses, one after the other, put together. All processes must go through them."""
    let_go_of_wholes(model)
    for name, param in model.named_parameters():
        if keep(name, param):
            yield name, full_tensor(param).detach()


def let_go_of_wholes(model: nn.Module) -> None:
    """Makes the parameters of a model those that it keeps: after an answer or a validation some are still whole.

    Those lie in memory that `fully_shard` will use again: what is written there is lost, and what is read from there
    changes later.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def as_weight(tensor: torch.Tensor, fabric: "Fabric") -> torch.Tensor:
    """A whole tensor as the run will hold the weights that it trains: on its device, and split if they are."""
    mesh = mesh_of(fabric)
    if mesh is None:
        return tensor.to(fabric.device)
    return slice_of(tensor, mesh, fabric.device)


def rows_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of a whole tensor, which every process can read, that this one has of `like`: a view."""
    if not hasattr(like, "device_mesh"):
        return tensor
    return tensor[own_rows(len(tensor), like.device_mesh)]  # type: ignore[attr-defined] # a DTensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, split as `like` is."""
    if not hasattr(like, "device_mesh"):
        return tensor
    return slice_of(tensor, like.device_mesh, like.device)  # type: ignore[attr-defined] # a DTensor


# ---- answers


def without_gradients(model: nn.Module) -> AbstractContextManager:
    """A context in which a model answers: torch's fastest, unless the model is split.

    `fully_shard` keeps the memory in which it puts a block together, and inference tensors in it could not be trained
    with afterwards.
    """
    return torch.no_grad() if computes_split(model) else torch.inference_mode()


def agreed_by_all(model: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """What the first process says, if a model is split, so that all go on with the same token. All must call it."""
    if computes_split(model):
        torch.distributed.broadcast(tensor, src=0)
    return tensor
