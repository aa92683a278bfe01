"""The files of a checkpoint's weights: which ones they are, what their headers say, and the tensors in them."""

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_gpt.config import check_is_checkpoint, read_json
from lit_gpt.errors import InputError, reading
from lit_gpt.files import INSTEAD_OF_POINTER, is_pointer, list_some
from lit_gpt.out_of_memory import explain_memory

# a set of weights is a file of this name, or several and NAME.index.json
CONVERTED = "lit_model.safetensors"  # scripts/convert_hf_checkpoint.py wrote it
HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "original/*.pth")

MAPPED_AT_ONCE = 64 * 10**6  # bytes of a file whose tensors are copied

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names of dtypes


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor before it is read."""

    dtype: str
    """torch's name of it, such as bfloat16; of dtypes that hold no weights as they are, perhaps safetensors' own."""
    shape: tuple[int, ...]
    file: Path


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, those that transformers reads: safetensors before .bin.

    A folder that `scripts/convert_hf_checkpoint.py` wrote has ours.

    Raises:
        InputError: there is no such folder, there are none in it, one that the index names is missing, or there are
            two sets of which different programs read different ones, or an adapter beside them.
    """
    check_is_checkpoint(checkpoint_dir)
    converted = files_of_set(checkpoint_dir, CONVERTED)
    theirs = next((files for name in HUGGING_FACE if (files := files_of_set(checkpoint_dir, name))), [])
    if converted and theirs:
        raise two_sets(checkpoint_dir, converted[0].name, theirs[0].name)
    if not converted and not theirs:
        raise no_weights(checkpoint_dir)
    if theirs:
        check_no_other_is_named(checkpoint_dir, theirs)
        check_no_adapter(checkpoint_dir, theirs)
    return converted or theirs


def check_no_other_is_named(checkpoint_dir: Path, files: list[Path]) -> None:
    """Raises InputError if config.json names other files than these as the weights, which transformers then reads."""
    config = checkpoint_dir / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    own_names = {file.name for file in files} | {f"{name}.index.json" for name in HUGGING_FACE}
    if named is not None and named not in own_names:
        raise InputError(
            f"{config} names {named} as the weights (transformers_weights), and {files[0].name} would be read. Give the"
            " named file that name, or take the key out of config.json."
        )


def check_no_adapter(checkpoint_dir: Path, files: list[Path]) -> None:
    """Raises InputError if an adapter of peft lies beside these weights.

    transformers with peft puts it on them, also on those that it was merged into; other programs leave it alone.
    """
    if not (checkpoint_dir / "adapter_config.json").is_file():
        return
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (checkpoint_dir / name).is_file():
            raise InputError(
                f"{checkpoint_dir} holds a model, {files[0].name}, and an adapter of peft, {name}, and programs differ"
                " in whether they put it on the model. Move one of them to another folder; an adapter goes with its"
                " adapter_config.json, and --finetuned names it."
            )


def files_of_set(folder: Path, name: str) -> list[Path]:
    """The files of the set that is called `name`: one of that name, or those that its index names. Empty if none.

    Raises:
        InputError: a file that the index names is missing; or there is a whole file and parts as well.
    """
    whole = folder / name
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [whole] if whole.is_file() else []
    parts = indexed_files(index)
    there = [part for part in parts if part.is_file()]
    if not whole.is_file() or parts == [whole]:
        if missing := [part.name for part in parts if part not in there]:
            raise InputError(f"{folder} lacks {', '.join(missing)}. Download the checkpoint again.")
        return parts
    if there:
        # transformers reads the whole file, vLLM the parts
        raise two_sets(folder, name, f"{index.name} with {there[0].name}")
    return [whole]  # the index is of an earlier save, whose parts are gone


def two_sets(folder: Path, first: str, second: str) -> InputError:
    return InputError(
        f"{folder} holds two sets of weights, {first} and {second}, and programs differ in which they read. Delete"
        " one of them, or move it to another folder."
    )


def no_weights(folder: Path) -> InputError:
    """The error for a folder without weights that can be read: it names those that cannot."""
    others = {path.relative_to(folder) for pattern in OTHER_WEIGHTS for path in folder.glob(pattern)}
    if folder.joinpath("adapter_config.json").is_file():
        advice = "It holds an adapter of peft: name it with --finetuned."
    elif any(path.name.startswith(("model-", "pytorch_model-")) for path in others):
        advice = f"It holds {list_some(others)}: parts, and not the index.json that says what is in them. Fetch it."
    elif others:
        advice = f"It holds {list_some(others)}, in another layout: download the files that transformers reads."
    else:
        advice = "`python scripts/download_sample.py` fetches a small checkpoint."
    return InputError(
        f"{folder} has no weights: no model.safetensors, no pytorch_model.bin and no index of parts of them. {advice}"
    )


def indexed_files(index: Path) -> list[Path]:
    """The files that a model.safetensors.index.json names, which says for each tensor where it is.

    Raises:
        InputError: it names none, or is damaged.
    """
    content = read_json(index)
    with reading(index):
        names = sorted(set(content["weight_map"].values()))
        files = [index.parent / name for name in names]
    if not files:
        raise InputError(f"{index.parent} lacks all weights: {index.name} names none. Download the checkpoint again.")
    return files


def is_converted(files: list[Path]) -> bool:
    """Whether the tensors have our own names and layout: `scripts/convert_hf_checkpoint.py` wrote them."""
    return files[0].name.startswith("lit_model")


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """What the files say of their tensors, by name. No weight is read, but for a .bin of before torch 1.6.

    Raises:
        InputError: a file is damaged, or a name is in two of them.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        found: dict[str, TensorHeader] = {}
        if file.suffix == ".bin":
            for name, tensor in read_bin(file).items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                found[name] = TensorHeader(dtype, tuple(tensor.shape), file)
        else:
            with open_safetensors(file) as tensors:
                for name in tensors.offset_keys():
                    part = tensors.get_slice(name)
                    dtype = part.get_dtype()
                    found[name] = TensorHeader(DTYPES.get(dtype, dtype), tuple(part.get_shape()), file)

        for name in found.keys() & headers.keys():
            raise InputError(f"{name} is in {headers[name].file} and in {file.name}. Download the checkpoint again.")
        headers |= found
    return headers


def read_tensors(files: Iterable[Path], let_go: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor with its name, in file order.

    A tensor of a safetensors file is mapped into memory: what is looked at is read, and counts as the process' memory
    for as long as a tensor of the same mapping is there. With `let_go` there is a new mapping after every 64 MB, for
    who copies what it needs of each tensor.
    """
    for file in files:
        if file.suffix == ".bin":
            yield from read_bin(file).items()
            continue
        with open_safetensors(file) as tensors:
            names = tensors.offset_keys()
        while names:
            with open_safetensors(file) as tensors:
                mapped = 0
                while names and (mapped < MAPPED_AT_ONCE or not let_go):
                    name = names.pop(0)
                    tensor = tensors.get_tensor(name)
                    mapped += tensor.nbytes
                    yield name, tensor
                    del tensor


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Opens a file of tensors, which are read when they are asked for.

    Raises:
        InputError: it is damaged.
        OSError: it may not be read.
    """
    from safetensors import SafetensorError, safe_open

    with file.open("rb"):  # the system's error names the file; safetensors takes one that is not ours for missing
        pass
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise damaged(file, first_line(error)) from error


def read_bin(file: Path) -> dict[str, torch.Tensor]:
    """Reads a file that `torch.save` wrote, if it holds nothing but tensors by name. No code in it is run.

    Raises:
        InputError: it holds something else, or is damaged.
    """
    is_zip = zipfile.is_zipfile(file)  # before torch 1.6 it was none, and cannot be mapped into memory
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        if explain_memory(error) is not None:
            raise  # the file is not at fault
        if is_pointer(file):
            raise damaged(file, "") from error
        # A damaged file makes the unpickler fail with almost any error. Only its kind is shown: for what
        # weights_only refuses, torch's own text advises to load the file without it, which runs the code in it.
        raise InputError(
            f"{file} is damaged, or is no plain file of tensors ({type(error).__name__}). Download it again, best as"
            " safetensors."
        ) from error
    if not isinstance(tensors, dict):
        raise InputError(f"{file} is no plain file of tensors: it holds a {type(tensors).__name__}.")
    others = [str(name) for name, value in tensors.items() if not torch.is_tensor(value)]
    if others:
        listed = ", ".join(others[:5])
        raise InputError(f"{file} is no plain file of tensors: it also holds {listed}.")
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The text fields in the header of a safetensors file; empty for a .bin, which has none."""
    if file.suffix != ".safetensors":
        return {}
    with open_safetensors(file) as tensors:
        return tensors.metadata() or {}


def damaged(file: Path, reason: str) -> InputError:
    """The error for a file that cannot be read as weights."""
    if is_pointer(file):
        return InputError(f"{file} is a Git LFS pointer, a text in the place of the weights. {INSTEAD_OF_POINTER}")
    return InputError(f"{file} is damaged or incomplete ({reason}). Download it again, or train anew.")


def first_line(error: Exception) -> str:
    """The first line of an error's message, which may have a page of them."""
    lines = str(error).strip().split("\n")
    return lines[0].rstrip(".")
