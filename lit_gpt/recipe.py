"""What all recipes in finetune/ have in common: the settings they share, how a run begins, and how it ends.

In between a recipe builds its model, loads it and changes it: that is what it is there to show.
"""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch

from lit_gpt.blocks import ActivationCheckpointing, compile_blocks, recompute_blocks
from lit_gpt.checkpoint import build_model
from lit_gpt.cli import command
from lit_gpt.config import SAMPLE, Config
from lit_gpt.dataset import Dataset
from lit_gpt.device import (
    LoggerName,
    Precision,
    Strategy,
    is_sharded,
    launch,
    loading_device,
    trained_dtype,
    weight_dtype,
)
from lit_gpt.errors import InputError
from lit_gpt.finetuned import METHODS, Checkpoints, Finetuned, claim_out_dir, load_trained, start_run
from lit_gpt.generate import answers
from lit_gpt.memory import heaviest_lengths, plan, setup_of
from lit_gpt.model import GPT
from lit_gpt.quantize import Quantize, quantization
from lit_gpt.report import finish
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.train import TrainArgs, check_optimizer, fit

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class LaunchArgs:
    """Flags of every recipe: from what it starts, where it writes, and where it runs."""

    checkpoint_dir: Path = SAMPLE
    """The base model: a Hugging Face folder, or a converted copy of one."""
    out_dir: Path = Path("out")
    """Where the trained weights, the settings and the report of this run go."""
    precision: Precision = "auto"
    """Of the frozen weights and the arithmetic. What an adapter trains is always float32. auto is bf16-true on a GPU
    that has it, else 32-true."""
    optimizer: str = "torch.optim.AdamW"
    """The path of its class, such as bitsandbytes.optim.AdamW8bit or bitsandbytes.optim.PagedAdamW8bit on a GPU."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Save memory by computing again in backward: block all but what goes into a block, selective the MLPs, which keep
    the most. The result stays the same."""
    compile: bool = False
    """Compile the blocks with torch.compile: the first steps take minutes, all others less time."""
    devices: int = 1
    """GPUs of each machine, or processes where there is no GPU. Under torchrun, its number."""
    num_nodes: int = 1
    """Machines."""
    strategy: Strategy = "auto"
    """ddp: each device has all weights. fsdp: they are split among the devices. auto is fsdp for full fine-tuning, and
    ddp for all that trains little."""
    resume: bool = False
    """Continue the run in out_dir."""
    overwrite: bool = False
    """Replace the run in out_dir."""
    logger: LoggerName | None = None
    """tensorboard or wandb, besides metrics.csv."""
    seed: int = 1337
    """Of the weights that start at random."""


@dataclass(frozen=True)
class RunArgs(LaunchArgs):
    """Flags of every recipe that teaches a model to answer."""

    data_dir: Path = Path("data/docstrings")
    """What one of scripts/prepare_*.py wrote."""
    n_answers: int = 5
    """How many validation records to answer before and after, for the report."""


SPEED = {True: 2e11, False: 1e14}  # operations a second, roughly: of a CPU, of a GPU
Shared = Annotated[Any, RunArgs]  # `**shared: Shared` makes them flags of a recipe's `main`


class Run(NamedTuple):
    """A run that has begun: its processes are there, its inputs fit each other, and no weight is read yet."""

    args: RunArgs
    settings: dict[str, Any]
    """All of the recipe's, for hyperparameters.yaml."""
    config: Config
    tokenizer: Tokenizer
    train_data: Dataset
    val_data: Dataset
    fabric: "Fabric"
    device: torch.device
    """Where weights are read to."""

    @property
    def source(self) -> tuple[Path, torch.dtype, torch.device]:
        """From where `load_weights` reads the base, as what, and to where."""
        return self.args.checkpoint_dir, weight_dtype(self.args.precision), self.device


def chosen(kind: type, shared: dict[str, Any]) -> Any:
    """The settings of one kind, where a recipe's flags are those of several."""
    return kind(**{field.name: shared[field.name] for field in fields(kind) if field.name in shared})


def begin(settings: dict[str, Any], full: bool = False) -> Run:
    """Looks at everything that can be found wrong before a weight is read, then starts the processes.

    `settings` are the arguments of the recipe's `main`, as `locals()` gives them in its first line. `full` says that
    the model's own weights train: on several devices --strategy auto then splits them.

    Raises:
        InputError: out_dir is taken, something is no checkpoint or no prepared data, they do not fit each other, or
            see `start`.
    """
    own = {key: value for key, value in settings.items() if key != "shared"}
    args = RunArgs(out_dir=own["out_dir"], **settings["shared"])
    claim_out_dir(args.out_dir, args.resume, args.overwrite)
    tokenizer, config = Tokenizer(args.checkpoint_dir), Config.from_checkpoint(args.checkpoint_dir)
    train_data, val_data = Dataset(args.data_dir, "train"), Dataset(args.data_dir, "val")
    train_data.check_fits(tokenizer, config)
    fabric = start(args, own_weights=full, shard=full)
    return Run(args, own | vars(args), config, tokenizer, train_data, val_data, fabric, loading_device(fabric))


def start(args: LaunchArgs, own_weights: bool = False, shard: bool = False) -> "Fabric":
    """The processes of a run, by the flags of the recipe. `own_weights` says that the model's own ones train.

    Raises:
        InputError: see `trained_dtype`, `launch` and `check_optimizer`.
    """
    if own_weights:
        trained_dtype(args.precision)
    where = args.num_nodes, args.strategy, shard
    fabric = launch(args.devices, args.precision, args.seed, args.logger, str(args.out_dir), *where)
    check_optimizer(args.optimizer, fabric)
    return fabric


def set_blocks(model: GPT, args: LaunchArgs) -> None:
    """How the blocks run, by the flags of the recipe."""
    recompute_blocks(model, args.activation_checkpointing)
    if args.compile:
        compile_blocks(model)


def say_plan(run: Run, train: TrainArgs, method: str, settings: Any, quantize: Quantize | None) -> None:
    """Prints the memory that the heaviest step will take, where an epoch is long enough for that: a plan takes about a
    quarter of a second a block."""
    tokens, n_params = int(run.train_data.lengths().sum()), sum(p.numel() for p in build_model(run.config).parameters())
    epoch = 6 * n_params * tokens / SPEED[run.fabric.device.type == "cpu"]  # seconds
    if run.config.n_expert or 0.25 * run.config.n_layer > 0.05 * epoch:
        return
    flags = vars(run.args) | {"quantize": quantize}
    setup = setup_of(method, settings, flags, run.config, heaviest_lengths(run.train_data, train))
    try:
        split = " before it is split among the devices" if is_sharded(run.fabric) else ""
        print(f"Planned peak of a step{split}: {plan(setup)}.", file=sys.stderr)
    except InputError as error:  # a plan is a courtesy
        print(f"No plan of the memory: {error}", file=sys.stderr)


def finetune(run: Run, model: GPT, train: TrainArgs, method: str, method_settings: Any, base: str) -> None:
    """Trains what requires a gradient, saves it, and reports; the answers before and after stand side by side.

    `method` is a name in `finetuned.METHODS`, `base` the fingerprint of the weights that `model` was loaded with.
    """
    args, out_dir, fabric, val_data = run.args, run.args.out_dir, run.fabric, run.val_data
    description = Finetuned(
        method=method,
        settings=asdict(method_settings),
        checkpoint_dir=str(args.checkpoint_dir),
        base=base,
        tokenizer=run.tokenizer.fingerprint,
        prompt_style=run.train_data.meta["prompt_style"],
        quantize=quantization(model),
    )
    if fabric.is_global_zero:
        start_run(out_dir, run.settings)  # only now that everything has been found in order
    set_blocks(model, args)
    if fabric.is_global_zero:
        say_plan(run, train, method, method_settings, quantization(model))
    # a model that is split among the processes answers only if all ask it: the report then goes without
    n_answers = args.n_answers if fabric.is_global_zero and not is_sharded(fabric) else 0
    before = answers(model, run.tokenizer, val_data, n_answers)
    log = fit(
        fabric,
        model,
        run.train_data,
        val_data,
        train,
        Checkpoints(out_dir, model, description),
        resume=args.resume,
        show_sample=lambda: answers(model, run.tokenizer, val_data, min(n_answers, 1)),
        optimizer_class=args.optimizer,
    )

    if fabric.is_global_zero:
        if n_answers:
            load_trained(model, out_dir / "best", method)  # what --finetuned will use
        after = answers(model, run.tokenizer, val_data, n_answers)
        finish(log, out_dir, METHODS[method].title, command(), run.settings, before, after)
