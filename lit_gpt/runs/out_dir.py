"""TODO doc of runs.out_dir"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.cli import plain, read_hyperparameters, save_hyperparameters
from lit_gpt.errors import InputError
from lit_gpt.files import recover

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# what a run writes into its out_dir, and what is left of it where one is killed
RUN_FOLDERS = ("last", "best", "step-" + 6 * "[0-9]")
RUN_FILES = [name for folder in RUN_FOLDERS for name in (folder, f".{folder}.partial", f".{folder}.old")]
RUN_FILES += [name for file in ("metrics.csv", "report.md", "loss.png") for name in (file, f"{file}.tmp")]
RUN_FILES += ["hyperparameters.yaml", "tensorboard", "wandb"]
# of a classifier, and of a sweep over how much of it trains
RUN_FILES += ["confusion.png", "hidden.safetensors", "hidden.tmp"]
RUN_FILES += ["sweep.csv", "sweep.csv.tmp", "sweep.md", "sweep.png"]
RUN_FILES += [f"seed-[0-9]*-{step}" for step in ("features", "head", "last-[0-9]*")]
# what may differ when a run goes on: where its files are (fingerprints tell whether they are the same), when to stop,
# and what changes no result
MAY_CHANGE = {"checkpoint_dir", "data_dir", "out_dir", "logger", "n_answers", "sweep_seeds"}
MAY_CHANGE |= {"devices", "num_nodes", "strategy", "activation_checkpointing"}
MAY_CHANGE |= {f"train.{key}" for key in ("max_hours", "patience", "save_interval", "keep_steps")}
MAY_CHANGE |= {f"train.{key}" for key in ("micro_batch_size", "micro_batch_tokens", "share_prefixes")}


def claim_out_dir(out_dir: Path, resume: bool, overwrite: bool) -> None:
    """Looks whether `out_dir` is free for a run. Of several processes only the first does, since it soon writes there.

    Raises:
        InputError: it is not empty, and neither flag says what to do with what is there.
    """
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) > 0:
        return
    if resume and overwrite:
        raise InputError("--resume true continues the run and --overwrite true replaces it: choose one.")
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir} is a file, expected a folder.")
    if not (resume or overwrite) and out_dir.is_dir() and any(out_dir.iterdir()):
        raise InputError(
            f"{out_dir} is not empty. Continue the run in it with --resume true, replace it with --overwrite true,"
            " or name another --out_dir."
        )


def start_run(fabric: "Fabric", out_dir: Path, settings: dict[str, Any]) -> None:
    """What the first process of a run does to `out_dir`, once all that can be found wrong has been looked for.

    Deletes the run that `overwrite` replaces, and writes hyperparameters.yaml; a run that goes on keeps its own.

    Raises:
        InputError: a run is to go on with settings that are not its own.
    """
    if not fabric.is_global_zero:
        return
    path = out_dir / "hyperparameters.yaml"
    if settings["overwrite"]:
        for name in RUN_FILES:  # and nothing else: the folder may be somebody's home
            for found in out_dir.glob(name):
                shutil.rmtree(found) if found.is_dir() else found.unlink()
    recover(out_dir / "last")
    began = (out_dir / "last").is_dir() or (out_dir / "sweep.csv").is_file()
    if not (settings["resume"] and began and path.is_file()):
        return save_hyperparameters(path, settings)
    before, now = flat(read_hyperparameters(path)), flat(plain(settings))
    changed = [key for key, value in before.items() if key not in MAY_CHANGE and key in now and now[key] != value]
    if changed:
        what = ", ".join(f"{key} was {before[key]}, now {now[key]}" for key in changed)
        raise InputError(
            f"{out_dir} began with other settings: {what}. Go on with --config {path} --resume true,"
            " or change them there on purpose."
        )


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 1}} -> {"train.epochs": 1}, as the flags are called."""
    items = ((f"{prefix}{key}", value) for key, value in settings.items())
    return {
        k: v
        for key, value in items
        for k, v in (flat(value, f"{key}.") if isinstance(value, dict) else {key: value}).items()
    }
