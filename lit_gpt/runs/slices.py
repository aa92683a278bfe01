"""A run's weights and optimizer in slices: each process writes its own, and any number of processes reads them again.

    last/slices/shard-00001-model-00001-of-00001.safetensors    rows 0 to 3 of each tensor, written by process 0
    last/slices/shard-00002-model-00001-of-00001.safetensors    rows 4 to 7, written by process 1

It is torch.distributed.checkpoint, with safetensors as its files: its own format has a file that is unpickled. Where a
model is split among devices, nobody has to put it together, and all disks and networks are at work at once.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lit_gpt.errors import InputError
from lit_gpt.files import list_some

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

SLICES = "slices"  # the folder's name in `last`
FILE_BYTES = 2 * 10**9  # of the files of a process: torch holds each in memory while it writes


def save_slices(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the rows that this process has of each tensor. All processes must call it, with the same names.

    A tensor that is not split is written once.

    Raises:
        OSError: a process could not write, such as to a full disk.
    """
    from torch.distributed import checkpoint

    folder.mkdir(exist_ok=True)
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), files_of(tensors), save_distributed=True)
    try:
        with quietly():
            checkpoint.save(dict(tensors), storage_writer=writer)
    except checkpoint.CheckpointException as error:
        # all processes raise what any of them has met, with a traceback of each in its text
        first, _ = next(iter(error.failures.values()))
        if not isinstance(first, OSError):
            raise
        first.filename = first.filename or str(folder)
        raise first from None


def files_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The number of the file, from 1, that each tensor goes to."""
    files = {}
    number = 1
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            number += 1
            size = 0
        files[name] = number
        size += tensor.nbytes
    return files


def load_slices(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Reads into each tensor the rows that this process has of it. All processes must call it.

    Raises:
        InputError: a tensor is not in the folder, or has another shape there, or a file is damaged.
    """
    from safetensors import SafetensorError
    from torch.distributed import checkpoint

    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    try:
        with quietly():
            checkpoint.load(dict(tensors), storage_reader=reader)
    except (checkpoint.CheckpointException, SafetensorError) as error:
        # torch's exception has a traceback of each process in its text
        raise InputError(f"{folder} is damaged, or is of another run. Begin anew with --overwrite.") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Leaves out torch's warning that there is one process: one may well go on with what several wrote."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def stored_tensors(folder: Path) -> "dict[str, TensorStorageMetadata]":
    """What the files say of each tensor: its shape and its dtype.

    Raises:
        InputError: a file is damaged.
    """
    from safetensors import SafetensorError
    from torch.distributed import checkpoint

    try:
        metadata = checkpoint.HuggingFaceStorageReader(str(folder)).read_metadata()
    except SafetensorError as error:
        raise InputError(f"{folder} is damaged ({error}). Begin anew with --overwrite.") from error
    return metadata.state_dict_metadata  # type: ignore[return-value] # of nothing but tensors


def sizes_of_files(folder: Path) -> dict[str, int]:
    """The bytes of each file of a folder of slices, by its name."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def check_files(folder: Path, sizes: Mapping[str, int]) -> None:
    """Raises InputError if files are missing: torch would leave the rows in them as they were, without a word."""
    there = sizes_of_files(folder)
    changed = [name for name, size in sizes.items() if there.get(name) != size]
    if changed:
        raise InputError(
            f"{folder} lacks {list_some(changed)}, or it has changed. Put it back, or begin anew with --overwrite."
        )
