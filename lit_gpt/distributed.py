"""TODO doc of distributed"""

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_gpt.device import Precision, accelerator, precision_plugin, resolve_precision
from lit_gpt.errors import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Strategy = Literal["auto", "ddp", "fsdp"]


def launch(
    devices: int = 1,
    precision: Precision = "auto",
    seed: int = 0,
    loggers: Sequence[Any] = (),
    num_nodes: int = 1,
    strategy: Strategy = "auto",
    shard: bool = False,
) -> "Fabric":
    """Starts the processes of a run, one per device, each with the same seed. Under torchrun they are there already.

    `shard` is what strategy "auto" means where there are several: split all weights among the devices (fsdp), or give
    each a copy (ddp).

    Raises:
        InputError: there are fewer devices, torchrun was told another number.
    """
    from lightning_fabric import Fabric

    kind = accelerator()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        if devices not in (1, local) or num_nodes not in (1, world // local):
            raise InputError(
                f"torchrun started {local} processes on each of {world // local} machines, but --devices is {devices}"
                f" and --num_nodes {num_nodes}. Leave both flags out."
            )
        devices, num_nodes = local, world // local
    if min(devices, num_nodes) < 1:
        raise InputError(f"--devices {devices} --num_nodes {num_nodes}, expected 1 or more.")
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise InputError(f"--devices {devices}, but this machine has {torch.cuda.device_count()} GPUs.")
    if kind == "mps" and devices * num_nodes > 1:
        raise InputError(f"--devices {devices}, but PyTorch drives one Apple GPU only.")
    n_processes = devices * num_nodes
    fabric = Fabric(
        accelerator=kind,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy_of(n_processes, is_to_split(strategy, n_processes, shard)) if n_processes > 1 else "auto",
        plugins=[precision_plugin(resolve_precision(precision), kind)],
        loggers=list(loggers),
    )
    fabric.launch()
    if fabric.world_size > 1:
        watch(getattr(fabric.strategy.launcher, "procs", []), first=fabric.is_global_zero)
    torch.manual_seed(seed)
    return fabric


def is_to_split(strategy: Strategy, n_processes: int, shard: bool) -> bool:
    """Whether the weights are to be split among devices; `shard` is what "auto" means where there are several."""
    return strategy == "fsdp" or strategy == "auto" and shard and n_processes > 1


def strategy_of(n_processes: int, split: bool) -> Any:
    """Fabric's. fsdp is torch's `fully_shard`: each block, and then the rest, is whole only while it is at work."""
    if not split:
        return "ddp"
    from lightning_fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(split_weights, data_parallel_size=n_processes, tensor_parallel_size=1)


def split_weights(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    """Keeps a slice of the rows of every parameter, trained or frozen, in codes or not, on each device."""
    from torch.distributed.fsdp import fully_shard

    for block in getattr(model, "gpt", model).transformer.h:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def is_sharded(fabric: "Fabric") -> bool:
    """Whether each process will hold a slice of the model only, so that all must take part whenever it is used."""
    return type(fabric.strategy).__name__ == "ModelParallelStrategy"


def is_first() -> bool:
    """Whether this process is the first of its run, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def loading_device(fabric: "Fabric") -> torch.device:
    """Where weights are read to: what is to be split goes through the host's memory, as a whole model per process."""
    return torch.device("cpu") if is_sharded(fabric) else fabric.device


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter that is split among the processes, put together; any other as it is. All must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_parameters(
    model: torch.nn.Module, keep: Callable[[str, torch.Tensor], bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that `keep` chooses, one after the other, put together. All processes must go through them."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # what a validation left whole belongs to `fully_shard`, and is not to be lent
            module.reshard()
    for name, param in model.named_parameters():
        if keep(name, param):
            yield name, full_tensor(param).detach()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def as_weight(tensor: torch.Tensor, fabric: "Fabric") -> torch.Tensor:
    """A tensor as a run will hold the weights that it trains: on its device, and split where they are."""
    tensor = tensor.to(fabric.device)
    if not is_sharded(fabric):
        return tensor
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, fabric.strategy.device_mesh["data_parallel"], [Shard(0)])


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, split as `like` is."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def watch(processes: list[subprocess.Popen], first: bool) -> None:
    """Ends all processes of a run within seconds of the end of one, and lets that one have the last word.

    Without it the others wait for the one that is gone, or print what they think of its absence.
    """
    parent, leaving = os.getppid(), threading.Event()
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":  # Fabric's own, which would end all without a word
            thread._child_processes = []

    def look() -> None:
        while not leaving.wait(0.5):
            if processes and (failed := [process for process in processes if process.poll()]):
                if failed[0].returncode < 0:
                    rank = processes.index(failed[0]) + 1
                    print(f"error: process {rank} was ended by signal {-failed[0].returncode}.", file=sys.stderr)
                end(processes, seconds=0)
                os._exit(2 if failed[0].returncode == 2 else 1)
            if not processes and os.getppid() != parent:  # the first process, which started this one, is gone
                os._exit(1)
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()  # NCCL's is Fabric's to destroy

    thread = threading.Thread(target=look, daemon=True)

    def leave() -> None:
        # gloo's threads must not outlive the interpreter, in which they abort now and then. They end here, in a thread
        # that is not waited for too long: one that waits for another process's tensor does not end
        leaving.set()
        thread.join(timeout=5)
        end(processes)

    def report(*error: Any) -> None:
        time.sleep(5 if first else 10)  # if it is the echo of another's end, this one will not live so long
        sys.__excepthook__(*error)

    sys.excepthook = report
    atexit.register(leave)
    thread.start()


def end(processes: list[subprocess.Popen], seconds: float = 5) -> None:
    """Ends the other processes of a run whose first one has failed: they would wait for it, for up to half an hour."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
