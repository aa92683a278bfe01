"""Where a run happens: devices, precision, processes. The only file that says "cuda", "mps", "ddp" or "fsdp"."""

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_gpt.errors import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # importing it takes seconds: where it is used, and only there

Precision = Literal["auto", "bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true"]
DType = Literal["float32", "bfloat16", "float16"]
LoggerName = Literal["tensorboard", "wandb"]
Strategy = Literal["auto", "ddp", "fsdp"]


def accelerator() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_device() -> torch.device:
    return torch.device(accelerator())


def resolve_precision(precision: Precision) -> str:
    """`auto` is bf16-true on a GPU that has it, else 32-true: bfloat16 on a CPU can be 100 times slower."""
    if precision != "auto":
        return precision
    return "bf16-true" if accelerator() == "cuda" and torch.cuda.is_bf16_supported(False) else "32-true"


def weight_dtype(precision: Precision) -> torch.dtype:
    """What the loader stores frozen weights in. Mixed precision keeps them in float32 and casts as it computes."""
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(resolve_precision(precision), torch.float32)


def trained_dtype(precision: Precision) -> torch.dtype:
    """What weights are stored in that train themselves. Raises InputError for float16, in which they cannot."""
    if weight_dtype(precision) == torch.float16:
        raise InputError(
            f"--precision {precision} is for LoRA and adapters: weights in float16 cannot be trained themselves."
            " Choose 16-mixed or bf16-true."
        )
    return weight_dtype(precision)


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What mixed precision computes in; None where nothing is cast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def inference_dtype(precision: Precision) -> torch.dtype:
    """Raises InputError for mixed precision, which is about gradients."""
    if precision.endswith("mixed"):
        raise InputError(f"--precision {precision} is for training. Here, choose bf16-true, 16-true or 32-true.")
    return weight_dtype(precision)


def as_dtype(dtype: DType | None) -> torch.dtype | None:
    return None if dtype is None else getattr(torch, dtype)


def launch(
    devices: int = 1,
    precision: Precision = "auto",
    seed: int = 0,
    logger: LoggerName | None = None,
    log_dir: str = "out",
    num_nodes: int = 1,
    strategy: Strategy = "auto",
    shard: bool = False,
) -> "Fabric":
    """Starts the processes of a run, one per device, each with the same seed. Under torchrun they are there already.

    `shard` is what strategy "auto" means where there are several: split all weights among the devices (fsdp), or give
    each a copy (ddp).

    Raises:
        InputError: there are fewer devices, torchrun was told another number, or the logger is not installed.
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
        loggers=make_loggers(logger, log_dir),
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter that is split among the processes, put together; any other as it is. All must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_parameters(
    model: torch.nn.Module, keep: Callable[[str, torch.Tensor], bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that `keep` chooses, one after the other, put together. All processes must go through them."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # what a validation left whole belongs to `fully_shard`, and is not to be lent
            module.reshard()
    for name, param in model.named_parameters():
        if keep(name, param):
            yield name, whole(param).detach()


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def as_weight(tensor: torch.Tensor, fabric: "Fabric") -> torch.Tensor:
    """A tensor as a run will hold the weights that it trains: on its device, and split where they are."""
    tensor = tensor.to(fabric.device)
    if not is_sharded(fabric):
        return tensor
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, fabric.strategy.device_mesh["data_parallel"], [Shard(0)])


def split_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
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


def precision_plugin(precision: str, kind: str) -> Any:
    """Fabric's precision, but it casts no module: the loader has decided every tensor's dtype.

    Under bf16-true Fabric would cast float32 adapters, whose small updates would be rounded away, and the rotary
    frequencies, which would put the cosine of position 1,000 off by 0.43.
    """
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.plugins import Precision as FullPrecision

    class AsLoaded(FullPrecision):
        def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
            return module

    class Mixed(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            return data  # tokens and a Layout: integers

    class Scaled(Mixed):
        """float16 weights and float32 adapters: nothing is autocast, but the loss is scaled."""

        def forward_context(self) -> Any:
            return nullcontext()

    if precision in ("16-mixed", "bf16-mixed"):
        return Mixed(precision, kind)
    return Scaled("16-mixed", kind) if precision == "16-true" else AsLoaded()


def make_loggers(logger: LoggerName | None, log_dir: str) -> Sequence[Any]:
    """metrics.csv is always written; these come on top."""
    if logger is None:
        return []
    try:
        if logger == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            return [TensorBoardLogger(log_dir, name="tensorboard")]
        return [wandb_logger(log_dir)]
    except ModuleNotFoundError:
        raise InputError(f"--logger {logger} needs a package that is not installed: pip install {logger}") from None


def wandb_logger(log_dir: str) -> Any:
    """Fabric has one only in a package that imports a second trainer."""
    import wandb
    from lightning_fabric.loggers.logger import Logger
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    class WandbLogger(Logger):
        name, version = "wandb", None

        @rank_zero_only
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if wandb.run is None:
                wandb.init(dir=log_dir)
            wandb.log(metrics, step=step)

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """They are in hyperparameters.yaml."""

    return WandbLogger()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this run has held so far, in GB: of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # Windows has no such module

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
