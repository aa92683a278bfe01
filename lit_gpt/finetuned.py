"""What runs have trained: the folders `last` and `best`, and using them again.

`METHODS` is the list of fine-tuning methods: how each changes a model, and which keys it trains and saves.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from lit_gpt import peft
from lit_gpt.adapter import Adapter, adapter_filter, adapter_v2_filter, apply_adapter, apply_adapter_v2
from lit_gpt.checkpoint import (
    build_model,
    checked_tensors,
    load_model,
    load_weights,
    read_metadata,
    read_tensors,
    save_tensors,
    weight_files,
    write_files,
)
from lit_gpt.classify import Classifier, ClassifierArgs, TrainedClassifier, mark_trainable
from lit_gpt.cli import plain, read_hyperparameters, save_hyperparameters
from lit_gpt.config import SAMPLE, Config, read_json
from lit_gpt.device import Precision, inference_dtype, is_first, split_like, whole, whole_parameters
from lit_gpt.errors import InputError
from lit_gpt.files import beside, new_folder, recover
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.lora import LoRA, apply_lora, lora_filter
from lit_gpt.model import GPT
from lit_gpt.quantize import Quantize, quantize_linears
from lit_gpt.tokenizer import Tokenizer

NUMBER = " number"  # in the name of what an optimizer keeps as a plain number
QuantizeAs = Literal["auto", "none", Quantize]  # auto: as in training

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


@dataclass(frozen=True)
class Method:
    title: str
    settings: type
    apply: Callable[[GPT, Any], nn.Module]
    """Changes a loaded model and returns it, or what is now around it."""
    filter: Callable[[str, Any], bool]


def in_place(surgeon: Callable[[GPT, Any], Any]) -> Callable[[GPT, Any], GPT]:
    def apply(model: GPT, settings: Any) -> GPT:
        surgeon(model, settings)
        return model

    return apply


def as_classifier(model: GPT, trained: TrainedClassifier) -> Classifier:
    args = ClassifierArgs(**trained.args)
    if args.uses_lora:
        apply_lora(model, LoRA(**trained.lora))
    classifier = Classifier(model, len(trained.names), args)
    mark_trainable(classifier, args, lora_filter)
    return classifier


METHODS = {
    "lora": Method("LoRA", LoRA, in_place(apply_lora), lora_filter),
    "adapter": Method("LLaMA-Adapter", Adapter, in_place(apply_adapter), adapter_filter),
    "adapter_v2": Method("LLaMA-Adapter v2", Adapter, in_place(apply_adapter_v2), adapter_v2_filter),
    "full": Method("Full fine-tuning", Full, in_place(mark_chosen_as_trainable), lambda key, value: True),
    "classifier": Method("Classifier", TrainedClassifier, as_classifier, lambda key, value: value.requires_grad),
}


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


Shared = Annotated[Any, UseArgs]  # `**shared: Shared` makes them flags of a script's `main`


class Checkpoints:
    """The folders `last` and `best` of a run.

    Both hold the trained weights with all that is needed to use them, `last` also what is needed to train on. Every
    process of a run must call its methods, since each may hold a part of the weights; only the first one writes.
    """

    def __init__(self, out_dir: Path, model: GPT, description: Finetuned) -> None:
        self.out_dir, self.model, self.description, self.writes = out_dir, model, description, is_first()
        self.keep = METHODS[description.method].filter

    def save(self, name: str) -> None:
        with new_folder(self.out_dir / name) if self.writes else nullcontext() as folder:
            self.write_weights(folder)

    def save_state(self, name: str, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
        """Saves the weights, and with them the optimizer and `progress`, which is JSON."""
        with new_folder(self.out_dir / name) if self.writes else nullcontext() as folder:
            self.write_weights(folder)
            tensors = flatten(optimizer.state_dict()["state"])  # its settings are the run's
            if folder is not None:
                save_tensors(tensors, folder / "state.safetensors", {"progress": json.dumps(progress)})

    def write_weights(self, folder: Path | None) -> None:
        """What the method keeps, as a file; all weights, as a Hugging Face folder."""
        weights = whole_parameters(self.model, self.keep)
        header = {"lit_gpt": json.dumps(asdict(self.description))}
        if folder is None:
            for _ in weights:  # only to take part
                pass
        elif self.description.method == "full":
            write_files(weights, self.model.config, Path(self.description.checkpoint_dir), folder, metadata=header)
        else:
            save_tensors(dict(weights), folder / f"{self.description.method}.safetensors", header)

    def recover(self) -> None:
        for name in ("last", "best"):
            recover(self.out_dir / name)

    def resume(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Puts the last state back into the model and the optimizer; returns the progress, or None without a state."""
        last = self.out_dir / "last"
        if not (last / "state.safetensors").is_file():
            return None
        found, now = read_description(last), asdict(self.description)
        changed = [key for key, value in asdict(found).items() if value != now[key] and key != "checkpoint_dir"]
        if changed:
            raise InputError(f"{last} was trained with another {' and '.join(changed)}. Use the settings of that run.")
        load_trained(self.model, last, found.method)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        state = unflatten(dict(read_tensors([last / "state.safetensors"])))
        for index, entry in state.items():
            like = params[index]
            entry |= {k: split_like(v, like) for k, v in entry.items() if getattr(v, "shape", None) == like.shape}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return json.loads(read_metadata(last / "state.safetensors")["progress"])


def flatten(state: dict[Any, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """What an optimizer remembers, in which some nest dictionaries, by name."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            is_tensor = torch.is_tensor(value)
            found[f"{prefix}{key}{'' if is_tensor else NUMBER}"] = whole(value) if is_tensor else torch.tensor(value)
    return found


def unflatten(tensors: dict[str, torch.Tensor]) -> dict[Any, Any]:
    state: dict[Any, Any] = {}
    for name, tensor in tensors.items():
        index, *path, key = name.split(".")
        entry = state.setdefault(int(index), {})
        for part in path:
            entry = entry.setdefault(part, {})
        entry[key.removesuffix(NUMBER)] = tensor.item() if key.endswith(NUMBER) else tensor
    return state


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


def start_run(out_dir: Path, settings: dict[str, Any]) -> None:
    """Deletes the run that `overwrite` replaces, and writes hyperparameters.yaml; a run that goes on keeps its own.

    Raises:
        InputError: a run is to go on with settings that are not its own.
    """
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


def read_description(finetuned_dir: Path) -> Finetuned:
    """What was trained into this folder."""
    file = finetuned_file(finetuned_dir)
    header = read_metadata(file).get("lit_gpt")
    if header is None:
        raise InputError(f"{file} does not say what it is: it was not written by this toolkit.")
    return Finetuned(**json.loads(header))


def describe_peft(folder: Path) -> Finetuned:
    """Of an adapter that peft saved. It does not say with which tokenizer and prompt style it was trained."""
    settings = read_json(folder / peft.CONFIG)
    return Finetuned("lora", {}, settings.get("base_model_name_or_path") or "its base", "", "", "")


def finetuned_file(finetuned_dir: Path) -> Path:
    """The file of trained weights: in this folder, or in `best` of a run's."""
    for name in (finetuned_dir, finetuned_dir / "best"):
        for folder in (name, beside(name.absolute())[1]):  # read, not recovered: its run may be at work on it
            for method in METHODS:
                if (folder / f"{method}.safetensors").is_file():
                    return folder / f"{method}.safetensors"
            if (folder / "config.json").is_file():  # all weights
                return weight_files(folder)[0]
    names = " or ".join(f"{method}.safetensors" for method in METHODS if method != "full")
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
    if not isinstance(model, GPT):
        raise InputError(f"{args.finetuned} holds a classifier, which writes no text: use generate/classify.py.")
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
) -> tuple[GPT, Finetuned]:
    """A base model with what was trained on it, unmerged. `checkpoint_dir` None is the base it was trained on.

    `quantize` "auto" quantizes the base as it was in training. Says so on stderr where it is quantized otherwise.

    Raises:
        InputError: another base, or keys that do not fit it.
    """
    from_peft = (finetuned_dir / peft.CONFIG).is_file()
    description = describe_peft(finetuned_dir) if from_peft else read_description(finetuned_dir)
    if description.method == "full":  # a model of its own
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
    if description.method == "full":
        return model.eval(), description
    if base != description.base:
        raise InputError(
            f"{finetuned_dir} was trained on another base than {checkpoint_dir}: on {description.checkpoint_dir}."
        )
    method = METHODS[description.method]
    model = method.apply(model, method.settings(**description.settings))
    load_trained(model, finetuned_dir, description.method)
    return model.eval(), description


def load_classifier(
    checkpoint_dir: Path | None, finetuned_dir: Path, dtype: torch.dtype | None, device: torch.device | None
) -> tuple[Classifier, Tokenizer, TrainedClassifier]:
    """A classifier, its tokenizer, and what it was trained to do.

    Raises:
        InputError: see `load_finetuned`; or no classifier was trained there.
    """
    model, description = load_finetuned(checkpoint_dir, finetuned_dir, dtype, device)
    if not isinstance(model, Classifier):
        raise InputError(f"{finetuned_dir} holds no classifier: use generate/base.py.")
    return model, Tokenizer(checkpoint_dir or description.checkpoint_dir), TrainedClassifier(**description.settings)


def load_trained(model: GPT, finetuned_dir: Path, method: str) -> None:
    """Puts trained weights into a model that the method has been applied to. Every key must fit, both ways."""
    file = finetuned_file(finetuned_dir)
    tensors = checked_tensors(model, file.parent) if method == "full" else read_tensors([file])
    put(model, tensors, METHODS[method].filter, file)


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
                expected[key].copy_(split_like(value, expected[key]))
            else:
                unfit.append(key)
    if unfit or missing:
        raise InputError(f"{source} does not fit this model: {', '.join((unfit + sorted(missing))[:5])}.")
