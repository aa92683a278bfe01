"""Using what a run has trained: its header, its weights, and the base model they belong to."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lit_gpt.checkpoint import peft
from lit_gpt.checkpoint.load import (
    build_model,
    checked_tensors,
    load_model,
    load_weights,
    read_metadata,
    read_tensors,
    weight_files,
)
from lit_gpt.config import SAMPLE, Config, read_json
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.device import Precision, inference_dtype
from lit_gpt.distributed import shard_like
from lit_gpt.errors import InputError
from lit_gpt.files import beside
from lit_gpt.lora import apply_lora, lora_filter
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import Quantize, quantize_linears
from lit_gpt.runs.methods import METHODS, Method

QuantizeAs = Literal["auto", "none", Quantize]  # auto: as in training


@dataclass(frozen=True)
class Finetuned:
    """What stands in the header of a file of trained weights: all that is needed to use it."""

    method: str
    settings: dict[str, Any]
    checkpoint_dir: str
    base: str
    """Fingerprint of the base model."""
    tokenizer: str
    prompt_style: str
    quantize: Quantize | None = None
    """How the base was quantized in training. `base` does not depend on it."""


@dataclass(frozen=True)
class UseArgs:
    """Flags of every script that generates text: with which model, and how."""

    checkpoint_dir: Path | None = None
    """The model. None is the sample model, or the base of what was fine-tuned."""
    finetuned: Path | None = None
    """What a fine-tuning script wrote: an out_dir (its best), or one folder of it. It is not merged."""
    top_p: float | None = None
    """Sample from the fewest likeliest tokens that together have this probability."""
    precision: Precision = "auto"
    """Of the weights and the arithmetic."""
    quantize: QuantizeAs = "auto"
    """Keep the linears in 4 or 8 bits: a smaller model, and on a CPU a slower one. auto is what the fine-tuned weights
    were trained on, none the weights as they are."""
    seed: int = 1337
    """Of the sampling."""


def read_description(finetuned_dir: Path) -> Finetuned:
    """What was trained into this folder."""
    file = finetuned_file(finetuned_dir)
    header = read_metadata(file).get("lit_gpt")
    if header is None:
        raise InputError(f"{file} does not say what it is: it was not written by this toolkit.")
    return Finetuned(**json.loads(header))


def is_peft(folder: Path) -> bool:
    """Whether peft saved this adapter."""
    return (folder / peft.CONFIG).is_file()


def describe_peft(folder: Path) -> Finetuned:
    """Of an adapter that peft saved. It does not say with which tokenizer and prompt style it was trained."""
    settings = read_json(folder / peft.CONFIG)
    return Finetuned("lora", {}, settings.get("base_model_name_or_path") or "its base", "", "", "")


def finetuned_file(finetuned_dir: Path) -> Path:
    """The file of trained weights: in this folder, or in `best` of a run's."""
    for name in (finetuned_dir, finetuned_dir / "best"):
        for folder in (name, beside(name.absolute())[1]):  # read, not recovered: its run may be at work on it
            if (folder / "config.json").is_file():  # all weights
                return weight_files(folder)[0]
            for file in sorted(folder.glob("*.safetensors")):
                if file.stem in METHODS or "lit_gpt" in read_metadata(file):
                    return file
    names = " or ".join(f"{method.name}.safetensors" for method in METHODS.values() if not method.trains_base)
    raise InputError(f"{finetuned_dir} holds nothing trained: expected {names} in it or in its folder best.")


def load_for_use(args: UseArgs, device: torch.device) -> tuple[GPT, Tokenizer, str | None]:
    """A model, its tokenizer, and the prompt style it was fine-tuned with, if it was. That stays unmerged.

    Raises:
        InputError: see `load_finetuned` and `load_weights`.
    """
    dtype = inference_dtype(args.precision)
    if args.finetuned is None:
        checkpoint_dir = args.checkpoint_dir or SAMPLE
        kind = None if args.quantize in ("auto", "none") else args.quantize
        return load_model(checkpoint_dir, dtype, device, kind), Tokenizer(checkpoint_dir), None
    model, description = load_finetuned(args.checkpoint_dir, args.finetuned, dtype, device, args.quantize)
    tokenizer = Tokenizer(args.checkpoint_dir or description.checkpoint_dir)
    if description.tokenizer not in ("", tokenizer.fingerprint):
        raise InputError(f"{args.finetuned} was trained with another tokenizer than the one of its base now is.")
    return model, tokenizer, description.prompt_style or None


def load_finetuned(
    checkpoint_dir: Path | None,
    finetuned_dir: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantize: QuantizeAs = "auto",
    methods: Mapping[str, Method] = METHODS,
) -> tuple[GPT, Finetuned]:
    """A base model with what was trained on it, unmerged. `checkpoint_dir` None is the base it was trained on.

    `quantize` "auto" quantizes the base as it was in training. Says so on stderr where it is quantized otherwise.

    Raises:
        InputError: another base, or keys that do not fit it.
    """
    from_peft = is_peft(finetuned_dir)
    description = describe_peft(finetuned_dir) if from_peft else read_description(finetuned_dir)
    method = methods.get(description.method)
    if method is None:
        raise InputError(
            f"{finetuned_dir} holds a {description.method}, which writes no text: use generate/classify.py."
        )
    if method.trains_base:  # a model of its own
        description = replace(description, checkpoint_dir=str(finetuned_file(finetuned_dir).parent))
        checkpoint_dir = None
    checkpoint_dir = Path(checkpoint_dir or description.checkpoint_dir)
    if not checkpoint_dir.is_dir():
        raise InputError(
            f"{finetuned_dir} was trained on {checkpoint_dir}, which is not there. Name it: --checkpoint_dir."
        )
    trained = description.quantize or "none"
    kind = trained if quantize == "auto" else quantize
    if kind != trained:
        was, now = ("the original weights" if k == "none" else f"weights in {k}" for k in (trained, kind))
        print(f"{finetuned_dir} was trained on {was}, here it is used on {now}: not quite the same.", file=sys.stderr)
    model = build_model(Config.from_checkpoint(checkpoint_dir))
    quantize_linears(model, None if kind == "none" else kind)
    base = load_weights(model, checkpoint_dir, dtype, device)
    if from_peft:
        lora, tensors = peft.load_peft(finetuned_dir, model.config)
        apply_lora(model, lora)
        put(model, tensors.items(), lora_filter, finetuned_dir)
        return model.eval(), replace(description, settings=asdict(lora), base=base)
    if method.trains_base:
        return model.eval(), description
    if base != description.base:
        raise InputError(
            f"{finetuned_dir} was trained on another base than {checkpoint_dir}: on {description.checkpoint_dir}."
        )
    model = method.apply(model, method.settings(**description.settings))
    load_trained(model, finetuned_dir, method)
    return model.eval(), description


def load_trained(model: GPT, finetuned_dir: Path, method: Method) -> None:
    """Puts trained weights into a model that the method has been applied to. Every key must fit, both ways."""
    file = finetuned_file(finetuned_dir)
    tensors = checked_tensors(model, file.parent) if method.trains_base else read_tensors([file])
    put(model, tensors, method.filter, file)


def put(
    model: nn.Module, found: Iterable[tuple[str, torch.Tensor]], keep: Callable[[str, Any], bool], source: Path
) -> None:
    """Copies `found` into the parameters that `keep` names. Raises InputError where they are not the same ones."""
    expected = {key: value for key, value in model.named_parameters() if keep(key, value)}
    unfit, missing = [], set(expected)
    with torch.no_grad():
        for key, value in found:
            missing.discard(key)
            if key in expected and expected[key].shape == value.shape:
                expected[key].copy_(shard_like(value, expected[key]))
            else:
                unfit.append(key)
    if unfit or missing:
        raise InputError(f"{source} does not fit this model: {', '.join((unfit + sorted(missing))[:5])}.")
