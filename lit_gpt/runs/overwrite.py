"""--overwrite: what of an out_dir belongs to runs, and how the earlier run is kept until the new one has saved.

    out_dir/.before.partial     the files of the earlier run are being moved aside, or back
    out_dir/.before             they are aside, and the new run has saved nothing
    out_dir/.before.old         the new run has saved: they are being deleted

A run that ends before its first save, such as on a full disk, leaves the earlier run in its place again. If it was
killed, whoever reads the out_dir still finds the earlier run, and the next command puts things right.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from lit_gpt import failures

# What runs write into an out_dir, as patterns. `--overwrite` replaces these and nothing else: the folder may be
# somebody's home. A classifier's are here, too, since every recipe may take the place of every other one's run.
FOLDERS = (
    "last",
    "best",
    "step-[0-9][0-9][0-9][0-9][0-9][0-9]",  # --train.keep_steps
)
FILES = (
    "hyperparameters.yaml",
    "metrics.csv",
    "val_losses.csv",
    "report.md",
    "loss.png",
    "confusion.png",  # of a classifier
    "reliability.png",
    "scores.csv",
    "hidden.safetensors",
    "sweep.csv",  # of a sweep over how much of a classifier trains
    "sweep_scores.csv",
    "sweep.md",
    "sweep.png",
    "labels_curve.csv",  # of a curve over how many labels it has
    "labels_curve_scores.csv",
    "labels_curve.md",
    "labels_curve.png",
)
OTHERS = (
    "tensorboard",  # --logger
    "wandb",
    "seed-[0-9]*-features",  # the classifiers of a sweep
    "seed-[0-9]*-head",
    "seed-[0-9]*-last-[0-9]*",
    "seed-[0-9]*-[0-9]*-labels",  # and of a curve
)
# and what is left of them where a process was killed, see lit_gpt/files.py
LEFTOVERS_OF_FOLDERS = (".{}.partial", ".{}.old")
LEFTOVERS_OF_FILES = ("{}.tmp",)

BEFORE = ".before"

EARLIER: dict[Path, str] = {}
"""The folder `.before` of this process's run, as long as nothing has been saved, and the command that continues the
run from then on. Empty if nothing is aside."""


def paths_of_run(out_dir: Path) -> Iterator[Path]:
    """What runs have written into an out_dir, finished or killed, and nothing else."""
    patterns = [*FOLDERS, *FILES, *OTHERS]
    for folder in FOLDERS:
        patterns += [leftover.format(folder) for leftover in LEFTOVERS_OF_FOLDERS]
    for file in FILES:
        patterns += [leftover.format(file) for leftover in LEFTOVERS_OF_FILES]
    for pattern in patterns:
        yield from sorted(out_dir.glob(pattern))


def delete_run(out_dir: Path) -> None:
    """Deletes the run in an out_dir; what is set aside stays."""
    for path in paths_of_run(out_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def set_aside(out_dir: Path) -> None:
    """Moves the run in an out_dir out of the way of a new one, unless there is one aside that nothing has replaced."""
    before, partial, _ = folders_aside(out_dir)
    if before.is_dir():
        delete_run(out_dir)  # it has saved nothing
        return
    paths = list(paths_of_run(out_dir))
    if not paths:
        return
    partial.mkdir()
    for path in paths:
        path.rename(partial / path.name)
    partial.rename(before)


def keep_until_saved(out_dir: Path, to_go_on: str) -> None:
    """Lets the first save of this process delete what is aside. The command `to_go_on` holds from then on."""
    before, _, _ = folders_aside(out_dir)
    EARLIER.clear()
    if before.is_dir():
        EARLIER[before] = to_go_on
        failures.HOW_TO_GO_ON.clear()


def drop_earlier_run() -> None:
    """Deletes the earlier run, if there is one aside: the new one has saved."""
    for before, to_go_on in EARLIER.items():
        drop(before)
        failures.HOW_TO_GO_ON[:] = [to_go_on]
    EARLIER.clear()


def drop(before: Path) -> None:
    """Deletes what is aside. Killed in the midst, the name says that it may go."""
    old = before.with_name(f"{BEFORE}.old")
    before.rename(old)
    shutil.rmtree(old)


def bring_back(out_dir: Path) -> None:
    """Puts the earlier run in its place again, if the new one has saved nothing."""
    before, partial, _ = folders_aside(out_dir)
    if not before.is_dir():
        return
    delete_run(out_dir)
    before.rename(partial)  # from here on, names in out_dir are those of the earlier run
    move_back(partial)


def move_back(partial: Path) -> None:
    """Moves what is in `.before.partial` to where it was."""
    for path in partial.iterdir():
        path.rename(partial.parent / path.name)
    partial.rmdir()


def recover_aside(out_dir: Path) -> None:
    """Ends what a killed process has begun: moving the earlier run aside or back, or deleting it."""
    before, partial, old = folders_aside(out_dir)
    if partial.is_dir():
        move_back(partial)
    if before.is_dir() and (out_dir / "last").is_dir():  # it was killed between its save and this
        drop(before)
    shutil.rmtree(old, ignore_errors=True)


def folders_aside(out_dir: Path) -> tuple[Path, Path, Path]:
    """`.before`, `.before.partial` and `.before.old`."""
    return out_dir / BEFORE, out_dir / f"{BEFORE}.partial", out_dir / f"{BEFORE}.old"


def as_it_was(path: Path) -> Path:
    """Where a folder of a run, such as its `best`, is to be read: aside, if a new run has not saved anything yet."""
    for aside in (BEFORE, f"{BEFORE}.partial"):
        earlier = path.parent / aside / path.name
        if earlier.exists():
            return earlier
    return path
