"""Folders that are either whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_gpt.errors import InputError


def must_be_empty(folder: Path) -> None:
    """Raises InputError where something is in the way of a new folder: `new_folder` would replace it."""
    must_be_elsewhere(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder. Name another one.")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty. Name another folder, or delete it first.")


def must_be_elsewhere(folder: Path) -> None:
    """Raises InputError for the working directory, whose place another folder cannot take."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{folder} is the folder you are in, expected a new one. Name one in it, such as new.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a hidden folder to write to, which takes the place of `folder` when the block ends without an error.

    Killed or failed at any moment, the old content of `folder` is still whole: under its name, or, for an instant,
    under `.NAME.old`, from where `recover` brings it back.
    """
    must_be_elsewhere(folder)
    folder = folder.resolve()  # a link stays one
    recover(folder)
    partial, old = beside(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)  # a rename must not reach the disk before the data
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """Clears away what a killed process left beside `folder`."""
    partial, old = beside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def beside(folder: Path) -> tuple[Path, Path]:
    folder = folder.resolve()  # "." has no name, and a rename would replace a link
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")  # then renamed: at any moment the file is old or new, never half
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
