"""The header of a file of trained weights: JSON that says all that is needed to use them again.

    best/lora.safetensors
    ├── metadata["lit_gpt"]   {"method": "lora", "settings": {"r": 8, ...}, "checkpoint_dir": ..., "base": ..., ...}
    └── tensors               transformer.h.0.attn.q.lora_A, ...: those that the method trains, or all of a model

`runs/saves.py` writes it, `runs/load_finetuned.py` builds a model by it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint import peft
from lit_gpt.checkpoint.weight_files import read_metadata, weight_files
from lit_gpt.config import read_json
from lit_gpt.errors import InputError
from lit_gpt.files import list_some, not_there, partial_and_old
from lit_gpt.quantize import Quantize
from lit_gpt.runs.methods import METHODS
from lit_gpt.runs.overwrite import as_it_was
from lit_gpt.runs.slices import SLICES

KEY = "lit_gpt"  # of the header, in the metadata of the safetensors file


@dataclass(frozen=True)
class Header:
    """How some weights were trained, and on which base model."""

    method: str
    """A name in `runs/methods.py`, or "classifier"."""
    settings: dict[str, Any]
    """Fields of the dataclass that the method is applied with."""
    checkpoint_dir: str
    base: str
    """Fingerprint of the base model."""
    tokenizer: str
    """Fingerprint of the tokenizer; empty if unknown."""
    prompt_style: str
    quantize: Quantize | None = None
    """How the base was quantized in training. `base` does not depend on it."""


def read_header(finetuned_dir: Path) -> Header:
    """The header of the trained weights in a folder, or in `best` of a run's folder.

    Raises:
        InputError: nothing trained is there, or another program wrote it.
    """
    file = finetuned_file(finetuned_dir)
    header = read_metadata(file).get(KEY)
    if header is None and (file.parent / "config.json").is_file():
        raise InputError(
            f"{file.parent} is a whole model that was not trained here, or a copy. It is named with --checkpoint_dir."
        )
    if header is None:
        raise InputError(f"{file} does not say what it is: it was not written by this toolkit.")
    return Header(**json.loads(header))


def is_peft(folder: Path) -> bool:
    """Whether this is an adapter that the library peft saved."""
    return (folder / peft.CONFIG).is_file()


def read_peft_header(folder: Path) -> Header:
    """A header for an adapter in peft's format, which keeps neither the tokenizer nor the prompt style of a training.

    How the base was quantized is known of those that were exported here.
    """
    settings = read_json(folder / peft.CONFIG)
    return Header(
        method="lora",
        settings={},
        checkpoint_dir=settings.get("base_model_name_or_path") or "its base",
        base="",
        tokenizer="",
        prompt_style="",
        quantize=peft.read_quantize(folder),
    )


def finetuned_file(finetuned_dir: Path) -> Path:
    """The file of trained weights in a folder, or in `best` of a run's folder; of a whole model its first file.

    Raises:
        InputError: nothing trained is there, or the folder itself is not.
    """
    for path in (finetuned_dir, finetuned_dir / "best"):
        name = as_it_was(path)
        # a run that is saving just now has its folder under another name for an instant: it is read there, and left
        _, old = partial_and_old(name.absolute())
        for folder in (name, old):
            if (folder / SLICES).is_dir():
                raise InputError(
                    f"{path} holds a run in slices, with which it goes on by --resume. Name its weights, those of best."
                )
            if (folder / "config.json").is_file():  # a model of its own
                return weight_files(folder)[0]
            for file in sorted(folder.glob("*.safetensors")):
                if file.stem in METHODS or KEY in read_metadata(file):
                    return file

    # what may be meant in its place?
    if not finetuned_dir.exists():
        others = [*runs_in(finetuned_dir.parent), *runs_in(Path("out")), *runs_in(Path("out"), depth=2)]
        raise not_there(finetuned_dir, others, "A run that has saved something is named by its --out_dir.")
    inside = runs_in(finetuned_dir)
    if inside:
        raise InputError(f"{finetuned_dir} holds runs, expected one of them. Name it: {list_some(inside)}.")
    adapters = {path.parent for path in finetuned_dir.glob(f"*/{peft.CONFIG}")}
    if adapters:
        raise InputError(
            f"{finetuned_dir} holds adapters of peft, expected one of them. Name it: {list_some(adapters)}."
        )
    if (finetuned_dir / "last").is_dir():  # killed; without validation records `best` comes at the end
        raise InputError(
            f"{finetuned_dir} has no best: its run has not ended. Name its newest weights, {finetuned_dir / 'last'}."
        )
    names = " or ".join(f"{method.name}.safetensors" for method in METHODS.values() if not method.trains_base)
    raise InputError(f"{finetuned_dir} holds nothing trained: expected {names} in it or in its folder best.")


def runs_in(folder: Path, depth: int = 1) -> set[Path]:
    """The runs in a folder, as deep in it, that have saved something trained."""
    return {path.parent for path in folder.glob("*/" * depth + "best")}
