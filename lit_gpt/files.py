"""Folders that a user named and that are not there; and folders and files that are whole or not there, even if the
process is killed while it writes them.

with new_folder(out_dir / "last") as folder:     # writes to .last.partial; then last -> .last.old, .last.partial
    save_tensors(tensors, folder / ...)          # -> last, and .last.old is deleted

with whole_file(out_dir / "loss.png") as file:   # writes to loss.png.tmp; then loss.png.tmp -> loss.png
    figure.savefig(file)
"""

import difflib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lit_gpt.errors import InputError
from lit_gpt.lock import NAME as LOCK
from lit_gpt.lock import clear_stale, lock_beside, only_writer

POINTER = b"version https://git-lfs"  # how a Git LFS pointer begins: what git keeps in the place of a large file
INSTEAD_OF_POINTER = "Run `git lfs pull` in that folder, or download the file itself."
CLONE = Path(__file__).parent.parent  # of the repository; most commands are typed there


def not_there(path: Path, like_it: Iterable[Path], otherwise: str) -> InputError:
    """The error for a path that a user named and that is not there.

    Args:
        path: What was named.
        like_it: What is there of its kind: the one with the nearest name is told.
        otherwise: A sentence that says what to type if that one is not meant.
    """
    where = "" if path.is_absolute() else f", as seen from {Path.cwd()}"
    if not path.is_absolute() and (CLONE / path).exists():
        advice = f"Run the command in {CLONE}, or name {CLONE / path}."
    else:
        advice = did_you_mean(path, like_it) + otherwise
    return InputError(f"{path} is not there{where}. {advice}".rstrip())


def did_you_mean(path: Path, others: Iterable[Path]) -> str:
    """A question that names the one of `others` which is nearest to `path`, and a space; empty if none is near."""
    names = sorted(str(other) for other in others)
    same_end = [name for name in names if Path(name).name == path.name]
    near = same_end or difflib.get_close_matches(str(path), names, n=1)
    return f"Did you mean {near[0]}? " if near else ""


def list_some(paths: Iterable[Path | str], most: int = 5) -> str:
    """The first paths in order, and how many more there are."""
    return some_of(sorted(str(path) for path in paths), ", ", most)


def some_of(texts: Sequence[str], separator: str, most: int = 5) -> str:
    """The first of some texts, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def must_be_empty(folder: Path) -> None:
    """Raises InputError if something is in the way of a new folder: `new_folder` would replace it."""
    must_be_elsewhere(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder. Name another one.")
    if has_content(folder):
        raise InputError(f"{folder} is not empty. Name another folder, or delete it first.")


def has_content(folder: Path) -> bool:
    """Whether anything is in a folder, but for the lock of a process that writes to it, or was killed."""
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


def must_be_elsewhere(folder: Path) -> None:
    """Raises InputError for the working directory, whose place another folder cannot take."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{folder} is the folder you are in, expected a new one. Name one in it, such as new.")


@contextmanager
def new_folder(folder: Path, lock: bool = True) -> Iterator[Path]:
    """Gives a hidden folder to write to, which takes the place of `folder` when the block ends without an error.

    Killed or failed at any moment, the old content of `folder` is still whole: under its name, or, for an instant,
    under `.NAME.old`, from where `recover` brings it back. `lock` False leaves out the lock, for a run that holds its
    whole out_dir.

    Raises:
        InputError: another process writes the folder, or it is the working directory.
    """
    must_be_elsewhere(folder)
    with only_writer(folder) if lock else nullcontext():
        yield from replacing_folder(folder)


def replacing_folder(folder: Path) -> Iterator[Path]:
    """The work of `new_folder`, by the only process that writes the folder."""
    folder = folder.resolve()  # a link stays one
    recover(folder)  # what an earlier process, which was killed, has left
    partial, old = partial_and_old(folder)
    partial.mkdir(parents=True)
    try:
        yield partial

        # a rename must not reach the disk before the data
        for path in partial.rglob("*"):
            sync(path)

        # no system call swaps two folders on every file system: for an instant there is none of that name
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        # of a block that failed only the new folder goes away; of one that did not, the old one
        recover(folder)


def recover(folder: Path) -> None:
    """Clears away what a killed process left of `new_folder(folder)`."""
    partial, old = partial_and_old(folder)
    # killed between the two renames
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    clear_stale(lock_beside(folder))


def partial_and_old(folder: Path) -> tuple[Path, Path]:
    """The names that `new_folder` uses next to `folder`: what is being written, and what it takes the place of."""
    folder = folder.resolve()  # "." has no name, and a rename would replace a link
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` when the block ends without an error.

    Killed at any moment, `path` is the old file or the new one; what was written is left behind as `NAME.tmp`.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # of a block that failed


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, in UTF-8, that is whole or not there."""
    with whole_file(path) as file:
        file.write_bytes(text.encode())


def expand_home(path: str) -> str:
    """A path with the home folder in the place of its ~: shells leave it in --flag=~/path, and in files of settings."""
    return os.path.expanduser(path) if path.startswith("~/") else path


def is_pointer(file: Path) -> bool:
    """Whether a file is what git keeps in the place of a large one."""
    with file.open("rb") as content:
        return content.read(len(POINTER)) == POINTER


def check_no_pointer(file: Path) -> None:
    """Raises InputError for what git keeps in the place of a large file."""
    if file.is_file() and is_pointer(file):
        raise InputError(f"{file} is a Git LFS pointer, a text in the place of the content. {INSTEAD_OF_POINTER}")
