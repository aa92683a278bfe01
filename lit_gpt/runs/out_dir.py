"""The out_dir of a run: whether it is free, what in it belongs to runs, and its hyperparameters.yaml."""

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt import failures
from lit_gpt.cli import command, plain, read_hyperparameters, save_hyperparameters
from lit_gpt.errors import InputError
from lit_gpt.failures import is_supervised
from lit_gpt.files import recover

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# What runs write into an out_dir, as patterns. `--overwrite` deletes these and nothing else: the folder may be
# somebody's home. A classifier's are here, too, since every recipe may take the place of every other one's run.
FOLDERS = (
    "last",
    "best",
    "step-[0-9][0-9][0-9][0-9][0-9][0-9]",  # --train.keep_steps
)
FILES = (
    "hyperparameters.yaml",
    "metrics.csv",
    "report.md",
    "loss.png",
    "confusion.png",  # of a classifier
    "hidden.safetensors",
    "sweep.csv",  # of a sweep over how much of a classifier trains
    "sweep.md",
    "sweep.png",
)
OTHERS = (
    "tensorboard",  # --logger
    "wandb",
    "seed-[0-9]*-features",  # the classifiers of a sweep
    "seed-[0-9]*-head",
    "seed-[0-9]*-last-[0-9]*",
)
# and what is left of them where a process was killed, see lit_gpt/files.py
LEFTOVERS_OF_FOLDERS = (".{}.partial", ".{}.old")
LEFTOVERS_OF_FILES = ("{}.tmp",)

# Settings that may differ when a run goes on. All others have to be those of its hyperparameters.yaml.
MAY_CHANGE = (
    # where things are: a fingerprint says whether they are the same ones
    "checkpoint_dir",
    "data_dir",
    "out_dir",
    # how long it goes on, and how often it saves
    "train.max_hours",
    "train.patience",
    "train.save_interval",
    "train.save_minutes",
    "train.keep_steps",
    "sweep_seeds",
    # what is shown of it
    "logger",
    "n_answers",
    # how a step is spread over passes and devices, which changes no result
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.share_prefixes",
    "activation_checkpointing",
    "devices",
    "num_nodes",
    "strategy",
)


def check_out_dir(out_dir: Path, resume: bool, overwrite: bool) -> None:
    """Checks that `out_dir` is free for a run. Of several processes only the first does, since it soon writes there.

    Raises:
        InputError: it is not empty, and neither flag says what to do with what is there.
    """
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) > 0:
        return
    if resume and overwrite:
        raise InputError("--resume continues the run and --overwrite replaces it: choose one.")
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir} is a file, expected a folder.")
    if not (resume or overwrite) and out_dir.is_dir() and any(out_dir.iterdir()):
        raise InputError(
            f"{out_dir} is not empty. Continue the run in it with --resume, replace it with --overwrite,"
            " or name another --out_dir."
        )


def start_run(fabric: "Fabric", out_dir: Path, settings: dict[str, Any]) -> None:
    """Readies `out_dir` in the first process, once all that can be found wrong has been looked for.

    Deletes the run that `overwrite` replaces, and writes hyperparameters.yaml; a run that goes on keeps its own. Says
    how to go on with this one if it is stopped or killed.

    Raises:
        InputError: a run is to go on with settings that are not its own.
    """
    to_go_on = command_to_go_on(out_dir)
    failures.HOW_TO_GO_ON[:] = [to_go_on]
    if not fabric.is_global_zero:
        return
    if settings["overwrite"]:
        delete_run(out_dir)
    recover(out_dir / "last")

    hyperparameters = out_dir / "hyperparameters.yaml"
    has_begun = (out_dir / "last").is_dir() or (out_dir / "sweep.csv").is_file()
    if settings["resume"] and has_begun and hyperparameters.is_file():
        check_same_settings(hyperparameters, settings)
    else:
        save_hyperparameters(hyperparameters, settings)
    print(f"If this run is stopped or killed, it goes on with: {to_go_on}", file=sys.stderr)


def command_to_go_on(out_dir: Path) -> str:
    """The command that continues the run in `out_dir`."""
    line = command(["--config", str(out_dir / "hyperparameters.yaml"), "--resume"])
    if "TORCHELASTIC_RUN_ID" in os.environ and not is_supervised():
        return f"{torchrun()} {line.removeprefix('python ')}"
    return line


def torchrun() -> str:
    """torchrun as it was typed, as far as its processes know: several machines need more flags, for their addresses."""
    n_machines = int(os.environ["GROUP_WORLD_SIZE"])
    machines = "--standalone" if n_machines == 1 else f"--nnodes {n_machines} ..."
    return f"torchrun {machines} --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"


def delete_run(out_dir: Path) -> None:
    """Deletes what runs write, finished or killed, and nothing else."""
    patterns = [*FOLDERS, *FILES, *OTHERS]
    for folder in FOLDERS:
        patterns += [leftover.format(folder) for leftover in LEFTOVERS_OF_FOLDERS]
    for file in FILES:
        patterns += [leftover.format(file) for leftover in LEFTOVERS_OF_FILES]
    for pattern in patterns:
        for path in out_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def check_same_settings(hyperparameters: Path, settings: dict[str, Any]) -> None:
    """Raises InputError if the run that wrote `hyperparameters` had others than `settings`, but for MAY_CHANGE."""
    before = by_flag(read_hyperparameters(hyperparameters))
    now = by_flag(plain(settings))
    changed = []
    for flag, value in before.items():
        if flag in now and now[flag] != value and flag not in MAY_CHANGE:
            changed.append(f"{flag} was {value}, now {now[flag]}")
    if changed:
        raise InputError(
            f"{hyperparameters.parent} began with other settings: {', '.join(changed)}. Go on with"
            f" --config {hyperparameters} --resume, or begin anew with --overwrite."
        )


def by_flag(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names of their flags: {"train": {"epochs": 1}} gives {"train.epochs": 1}."""
    flags: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flags |= by_flag(value, f"{prefix}{key}.")
        else:
            flags[f"{prefix}{key}"] = value
    return flags
