"""What the scripts in finetune/ have in common: the flags they share, and the acts that are the same in all.

`finetune/lora.py` shows a run act by act.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt.config import SAMPLE, Config
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.device import Precision, compiling_pays, trained_dtype
from lit_gpt.distributed import Strategy, check_one_device, launch
from lit_gpt.errors import InputError
from lit_gpt.make_optimizer import check_optimizer
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing, check_recomputed, recompute_blocks
from lit_gpt.model.compile import compile_blocks, missing_for_compiling
from lit_gpt.model.gpt import GPT
from lit_gpt.optimizer_in_backward import check_in_backward
from lit_gpt.quantize import quantization
from lit_gpt.ranges import check_range, check_seed
from lit_gpt.runs.header import Header
from lit_gpt.runs.loggers import LoggerName, make_loggers
from lit_gpt.runs.methods import Method
from lit_gpt.runs.saves import Checkpoints
from lit_gpt.sharding import computes_split, is_sharded, mesh_of_model
from lit_gpt.stream_blocks import stream_blocks

if TYPE_CHECKING:
    from lightning_fabric import Fabric


WHOLE_AT_MOST = 32 * 10**9  # bytes of `last` that one process writes by default, in half a minute on a fast disk


@dataclass(frozen=True)
class LaunchArgs:
    """Flags of every recipe: from what it starts, where it writes, and where it runs."""

    checkpoint_dir: Path = SAMPLE
    """The base model: a Hugging Face folder, or a converted copy of one."""
    out_dir: Path = Path("out")
    """Where the trained weights, the settings and the report of this run go."""
    precision: Precision = "auto"
    """Dtype of the frozen weights and of the arithmetic. What an adapter trains is always float32. auto is bf16-true on
    a GPU that has it, else 32-true."""
    optimizer: str = "torch.optim.AdamW"
    """The path of its class, such as bitsandbytes.optim.AdamW8bit or bitsandbytes.optim.PagedAdamW8bit on a GPU."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Save memory by computing again in backward: block all but what goes into a block, selective the MLPs, which keep
    the most. A number such as 12 is block for the first 12 blocks, which keep theirs the longest, and none for the
    others. The result stays the same."""
    compile: bool | None = None
    """Compile the blocks with torch.compile: the first steps take half a minute more, all others less time. null
    compiles on a GPU, if it has what that takes."""
    devices: int = 1
    """GPUs of each machine, or processes where there is no GPU. Under torchrun, its number."""
    num_nodes: int = 1
    """How many machines."""
    strategy: Strategy = "auto"
    """ddp: each device has all weights. fsdp: they are split among the devices. auto is fsdp for full fine-tuning, and
    ddp for all that trains little."""
    timeout_minutes: float = 30.0
    """With several devices: end the run if nothing has moved for so long, and name the process that hangs. It has to be
    longer than what the first process does alone, such as a save, or the answers for the report."""
    resume: bool = False
    """Continue the run in out_dir."""
    overwrite: bool = False
    """Replace the run in out_dir."""
    logger: LoggerName | None = None
    """tensorboard or wandb, besides metrics.csv."""
    seed: int = 1337
    """Seed of the weights that start at random."""

    def __post_init__(self) -> None:
        if isinstance(self.activation_checkpointing, int):
            check_range("--activation_checkpointing", self.activation_checkpointing, at_least=1)
        check_range("--devices", self.devices, at_least=1)
        check_range("--num_nodes", self.num_nodes, at_least=1)
        check_range("--timeout_minutes", self.timeout_minutes, above=0)
        check_seed("--seed", self.seed)


@dataclass(frozen=True)
class RunArgs(LaunchArgs):
    """Flags of every recipe that teaches a model to answer."""

    data_dir: Path = Path("data/docstrings")
    """The prepared data: a folder that one of scripts/prepare_*.py wrote."""
    n_answers: int = 5
    """How many validation records to answer before and after, for the report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--n_answers", self.n_answers, at_least=0)


def start_processes(
    args: LaunchArgs, trains_base: bool = False, shard: bool = False, optimizer_in_backward: bool = False
) -> "Fabric":
    """One process for each device, with the same --seed, on which the weights that start at random depend.

    With several devices this process starts its own command again for each, waits for them, and does not return. Each
    takes a trial step of the optimizer, before a weight is read.

    Args:
        args: The flags of the recipe.
        trains_base: Whether the model's own weights train, which float16 does not allow.
        shard: Whether --strategy auto splits the weights among several devices.
        optimizer_in_backward: Whether the optimizer steps in backward.

    Raises:
        InputError: see `check_recomputed`, `trained_dtype`, `launch`, `check_optimizer` and `check_in_backward`.
    """
    if isinstance(args.activation_checkpointing, int):
        n_layer = Config.from_checkpoint(args.checkpoint_dir).n_layer
        check_recomputed(args.activation_checkpointing, n_layer)
    if trains_base:
        trained_dtype(args.precision)
    fabric = launch(
        args.devices,
        args.precision,
        args.seed,
        loggers=make_loggers(args.logger, str(args.out_dir)),
        num_nodes=args.num_nodes,
        strategy=args.strategy,
        shard=shard,
        timeout_minutes=args.timeout_minutes,
    )
    check_optimizer(args.optimizer, fabric)
    if optimizer_in_backward:
        check_in_backward(args.optimizer, fabric)
    return fabric


def check_streaming(args: LaunchArgs) -> None:
    """Raises InputError if --stream_blocks cannot work with the other flags."""
    check_one_device("--stream_blocks", args.devices, args.num_nodes, args.strategy)
    if args.activation_checkpointing not in ("none", "block"):
        raise InputError(
            f"--stream_blocks computes every block again in backward, but --activation_checkpointing is"
            f" {args.activation_checkpointing}. Leave one of them out."
        )


def recompute_or_compile_blocks(model: GPT, args: LaunchArgs, stream_to: torch.device | None = None) -> None:
    """Changes how the blocks run, as --activation_checkpointing and --compile say; nothing by default on a CPU.

    With `stream_to` their frozen weights wait in the host's memory, and come to that device block by block.

    Raises:
        InputError: see `is_to_compile` and `stream_blocks`.
    """
    # in this order: what is compiled is computed again as a whole
    if is_to_compile(model, args.compile):
        compile_blocks(model)
    if stream_to is not None:
        stream_blocks(model, stream_to)  # computes every block again, too
    else:
        recompute_blocks(model, args.activation_checkpointing)


def is_to_compile(model: GPT, wish: bool | None) -> bool:
    """Whether to compile the blocks; `wish` is --compile, and None leaves it to the device.

    A GPU waits for Python less with compiled blocks: tutorials/gpu.md. On a CPU they gain little. A mixture of experts
    asks for values as it runs, where a graph has to end. Blocks of weights that are split among several GPUs have
    never been compiled: that is left to who asks for it.

    Raises:
        InputError: it is asked for, and something is missing that it needs.
    """
    device = next(model.parameters()).device
    by_default = compiling_pays(device) and not model.config.n_expert and mesh_of_model(model) is None
    if wish is False or (wish is None and not by_default):
        return False
    missing = missing_for_compiling(device)
    if not missing:
        return True
    what = f"torch.compile needs {' and '.join(missing)}, and this machine has none."
    how = "Debian and Ubuntu: apt install build-essential python3-dev."
    if wish:
        raise InputError(f"--compile: {what} {how} Or leave the flag out.")
    print(f"Steps will take longer than they could: {what} {how}", file=sys.stderr)
    return False


def new_checkpoints(
    method: Method,
    method_settings: Any,
    args: RunArgs,
    model: GPT,
    base_fingerprint: str,
    tokenizer: Tokenizer,
    train_data: Dataset,
    in_slices: bool = False,
) -> Checkpoints:
    """The folders `last` and `best` of a run; in each stands all that is needed to use the weights again.

    `base_fingerprint` is that of the weights that `model` was loaded with: they are used with no other base.
    `in_slices` is that of `Checkpoints`.
    """
    header = Header(
        method=method.name,
        settings=asdict(method_settings),
        checkpoint_dir=str(args.checkpoint_dir),
        base=base_fingerprint,
        tokenizer=tokenizer.fingerprint,
        prompt_style=train_data.meta["prompt_style"],
        quantize=quantization(model),
    )
    return Checkpoints(args.out_dir, model, header, method, in_slices)


def saves_slices(model: GPT, wish: bool | None) -> bool:
    """Whether each process writes its own slice of `last`; `wish` is --save_slices, and None leaves it to the size.

    Raises:
        InputError: it is asked for, and the model is not split.
    """
    if not computes_split(model):
        if wish:
            raise InputError("--save_slices is for weights that are split among several devices. Leave it out.")
        return False
    if wish is not None:
        return wish
    # the weights, and the two values that AdamW keeps for each that trains
    size = 0
    for param in model.parameters():
        size += param.numel() * param.dtype.itemsize * (3 if param.requires_grad else 1)
    return size > WHOLE_AT_MOST


def number_of_answers(fabric: "Fabric", args: RunArgs) -> int:
    """How many answers this process gives before and after, for the report.

    The first process gives all of them, and the others none; a model that is split answers only if all ask it.
    """
    return args.n_answers if fabric.is_global_zero or is_sharded(fabric) else 0
