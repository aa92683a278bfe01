"""The out_dir of a run: whether it is free, who writes there, and its hyperparameters.yaml."""

import os
import socket
import sys
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt import failures
from lit_gpt.cli import command, plain, read_hyperparameters, save_hyperparameters
from lit_gpt.distributed import check_alike, may_be_started_again
from lit_gpt.errors import InputError
from lit_gpt.failures import is_supervised
from lit_gpt.files import has_content, recover
from lit_gpt.lock import check_free, hold, lock_in
from lit_gpt.runs.overwrite import (
    BEFORE,
    EARLIER,
    FOLDERS,
    bring_back,
    keep_until_saved,
    paths_of_run,
    recover_aside,
    set_aside,
)
from lit_gpt.sharding import any_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Environment variables that count the processes or the machines of a run from 0. RANK, if it is there, counts best
PLACES = (
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "PMIX_RANK",
    "PMI_RANK",
    "MV2_COMM_WORLD_RANK",
    "JSM_NAMESPACE_RANK",
)

# Runs that train many classifiers keep a row for each in one of these, and have no `last` of their own
TABLES = ("sweep.csv", "labels_curve.csv")

# Settings that may differ between machines: where things are. A fingerprint says whether they are the same
PATHS = ("checkpoint_dir", "data_dir", "out_dir")

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
    "train.optimizer_in_backward",
    "activation_checkpointing",
    "stream_blocks",
    "devices",
    "num_nodes",
    "save_slices",
    "strategy",
    "timeout_minutes",
)


def claim_out_dir(out_dir: Path, resume: bool, overwrite: bool, checkpoint_dir: Path) -> None:
    """Checks that `out_dir` is free for a run of this base, and keeps other processes from writing there until this one
    ends.

    Of several processes of a run one does: their supervisor, or else the first of them.

    Raises:
        InputError: another process writes there; or it is not empty, and neither flag says what to do with what is
            there; or there is no run to resume.
    """
    if is_supervised() or not is_first_by_environment():
        return
    if resume and overwrite:
        raise InputError("--resume continues the run and --overwrite replaces it: choose one.")
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir} is a file, expected a folder.")
    if may_be_started_again() and not resume:
        raise InputError(
            "torchrun --max_restarts starts this command again after a failure, and then it has to go on: add"
            " --resume, which begins a run where there is none, and leave out --overwrite."
        )
    is_empty = not has_content(out_dir)
    begins = may_be_started_again() and is_empty  # what is started again has to be started once
    if resume and not begins and not holds_run(out_dir):
        there = "is empty" if out_dir.is_dir() and is_empty else "holds no run"
        if not out_dir.exists():
            there = "is not there"
        raise InputError(f"{out_dir} {there}, expected a run to resume. Name its --out_dir, or leave out --resume.")
    if overwrite and holds_base(out_dir, checkpoint_dir):
        raise InputError(
            f"--overwrite would delete {checkpoint_dir}, the base of this run, with the run in {out_dir}. Name another"
            " --out_dir."
        )
    if is_of_a_run(out_dir):
        check_free(lock_in(out_dir.parent), out_dir)
    if not (resume or overwrite) and has_content(out_dir):
        check_free(lock_in(out_dir), out_dir)  # the better reason, if it is one
        raise InputError(
            f"{out_dir} is not empty. Continue the run in it with --resume, replace it with --overwrite,"
            " or name another --out_dir."
        )
    hold(out_dir, at_end=partial(end_overwriting, out_dir))


def is_of_a_run(folder: Path) -> bool:
    """Whether a folder is called as those are that a run writes, such as best: a run in its parent may be at work."""
    return any(fnmatch(folder.resolve().name, pattern) for pattern in FOLDERS)


def holds_base(out_dir: Path, checkpoint_dir: Path) -> bool:
    """Whether a base is among what the run in `out_dir` has written, such as the `best` of a full fine-tuning."""
    base = checkpoint_dir.resolve()
    return any(base.is_relative_to(path.resolve()) for path in paths_of_run(out_dir))


def is_first_by_environment() -> bool:
    """Whether this process is the first of its run, as far as the one that started it tells: torchrun, SLURM, MPI."""
    rank = os.environ.get("RANK")
    if rank:
        return int(rank) == 0
    numbers = [os.environ.get(name) for name in PLACES]
    return not any(number and int(number) > 0 for number in numbers)


def holds_run(out_dir: Path) -> bool:
    """Whether a run has begun in a folder. It may not have saved yet."""
    first_file = "hyperparameters.yaml"
    names = (first_file, f"{first_file}.tmp", "last", ".last.old", *TABLES, BEFORE, f"{BEFORE}.partial")
    return any((out_dir / name).exists() for name in names)


def end_overwriting(out_dir: Path) -> None:
    """At the end of a process: if its run has replaced another one and not saved anything, that one is back."""
    recover_aside(out_dir)
    bring_back(out_dir)


def start_run(fabric: "Fabric", out_dir: Path, settings: dict[str, Any]) -> None:
    """Readies `out_dir` in the first process, once all that can be found wrong has been looked for.

    Sets the run aside that `overwrite` replaces, and writes hyperparameters.yaml; a run that goes on keeps its own.
    Says how to go on with this one if it is stopped or killed.

    Raises:
        InputError: a run is to go on with settings that are not its own, or the processes have other ones.
    """
    flags = by_flag(plain(settings))
    check_alike(fabric, {f"--{flag}": value for flag, value in flags.items() if flag not in PATHS})
    to_go_on = command_to_go_on(out_dir)
    failures.HOW_TO_GO_ON[:] = [to_go_on]
    if fabric.is_global_zero:
        write_settings(out_dir, settings, to_go_on)
    tell_of_own_disks(fabric, out_dir)


def write_settings(out_dir: Path, settings: dict[str, Any], to_go_on: str) -> None:
    """What `start_run` does in the first process alone; `to_go_on` is the command that continues the run.

    Raises:
        InputError: a run is to go on with settings that are not its own.
    """
    # what an earlier run was killed at
    recover_aside(out_dir)
    hyperparameters = out_dir / "hyperparameters.yaml"
    if settings["overwrite"]:
        set_aside(out_dir)
    elif (out_dir / BEFORE).is_dir() and differing(hyperparameters, settings):
        bring_back(out_dir)  # what is to go on is not the run that was killed before it saved
    keep_until_saved(out_dir, to_go_on)
    recover(out_dir / "last")

    # the settings
    has_begun = (out_dir / "last").is_dir() or any((out_dir / name).is_file() for name in TABLES)
    if settings["resume"] and has_begun and hyperparameters.is_file():
        check_same_settings(hyperparameters, settings)
    else:
        save_hyperparameters(hyperparameters, settings)
    if EARLIER:
        print(f"The earlier run in {out_dir} is kept until this one has saved, and stays if it fails.", file=sys.stderr)
    print(f"If this run is stopped or killed, it goes on with: {to_go_on}", file=sys.stderr)


def tell_of_own_disks(fabric: "Fabric", out_dir: Path) -> None:
    """Says, once, if a machine does not see what the first process has written. All processes must call it."""
    fabric.barrier()
    (not_seen,) = any_device(fabric, not (out_dir / "hyperparameters.yaml").is_file())
    if not_seen and fabric.is_global_zero:
        print(
            f"Not all machines see {out_dir} of {socket.gethostname()}, where this run saves: share that folder, or"
            " copy it to the others before you --resume.",
            file=sys.stderr,
        )


def command_to_go_on(out_dir: Path) -> str:
    """The command that continues the run in `out_dir`."""
    config = str(out_dir / "hyperparameters.yaml")
    if config.startswith("-"):
        config = f"./{config}"  # or it reads like a flag
    line = command(["--config", config, "--resume"])
    if "TORCHELASTIC_RUN_ID" in os.environ and not is_supervised():
        return f"{torchrun()} {line.removeprefix('python ')}"
    return line


def torchrun() -> str:
    """torchrun as it was typed, as far as its processes know: several machines need more flags, for their addresses."""
    n_machines = int(os.environ["GROUP_WORLD_SIZE"])
    machines = "--standalone" if n_machines == 1 else f"--nnodes {n_machines} ..."
    return f"torchrun {machines} --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"


def check_same_settings(hyperparameters: Path, settings: dict[str, Any]) -> None:
    """Raises InputError if the run that wrote `hyperparameters` had others than `settings`, but for MAY_CHANGE."""
    changed = differing(hyperparameters, settings)
    if changed:
        raise InputError(
            f"{hyperparameters.parent} began with other settings: {', '.join(changed)}. Go on with"
            f" --config {hyperparameters} --resume, or begin anew with --overwrite."
        )


def differing(hyperparameters: Path, settings: dict[str, Any]) -> list[str]:
    """The settings that were others in the run that wrote `hyperparameters`, each as a phrase, but for MAY_CHANGE."""
    if not hyperparameters.is_file():
        return [f"{hyperparameters} is not there"]
    before = by_flag(read_hyperparameters(hyperparameters))
    now = by_flag(plain(settings))
    changed = []
    for flag, value in before.items():
        if flag in now and now[flag] != value and flag not in MAY_CHANGE:
            changed.append(f"{flag} was {value}, now {now[flag]}")
    return changed


def by_flag(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names of their flags: {"train": {"epochs": 1}} gives {"train.epochs": 1}."""
    flags: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flags |= by_flag(value, f"{prefix}{key}.")
        else:
            flags[f"{prefix}{key}"] = value
    return flags
