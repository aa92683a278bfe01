"""Weights on disk: reading a checkpoint folder into a model, and saving what a run has trained.

`METHODS` is the list of fine-tuning methods: how each changes a model, and which keys it trains and saves.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_gpt.config import Config, read_json
from lit_gpt.convert import to_lit
from lit_gpt.errors import InputError
from lit_gpt.files import new_folder, recover
from lit_gpt.lora import LoRA, apply_lora, lora_filter
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Method:
    settings: type
    apply: Callable[[GPT, Any], list[str]]
    filter: Callable[[str, Any], bool]


# what a run writes into its out_dir
RUN_FILES = ("last", "best", "step-*", ".*.partial", ".*.old", "metrics.csv", "hyperparameters.yaml", "report.md")
RUN_FILES += ("loss.png", "tensorboard", "wandb")

METHODS = {"lora": Method(LoRA, apply_lora, lora_filter)}


# --- reading a checkpoint folder -------------------------------------------------------------------------------------


def build_model(config: Config) -> GPT:
    """A GPT without weights: on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return GPT(config).requires_grad_(False)


def load_model(checkpoint_dir: Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> GPT:
    """A GPT that is ready to use. `dtype` None keeps what the files hold.

    Raises:
        InputError: see `load_weights`.
    """
    model = build_model(Config.from_checkpoint(checkpoint_dir))
    load_weights(model, checkpoint_dir, dtype, device)
    return model.eval()


def load_weights(
    model: GPT, checkpoint_dir: Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> str:
    """Puts a checkpoint's tensors into `model`, one at a time and in file order, and returns their fingerprint.

    Takes a Hugging Face folder as it is, or one that `scripts/convert_hf_checkpoint.py` wrote. Each tensor goes to its
    dtype and device the moment it arrives, so that the peak is the model and one tensor.

    Raises:
        InputError: files are missing or damaged, tensors are missing, superfluous, of another shape or not finite. All
            that is wrong with the tensors is said at once.
    """
    checkpoint_dir, config = Path(checkpoint_dir), model.config
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    seen, problems, digests = set(), [], {}
    files = weight_files(checkpoint_dir)
    converted = files[0].name.startswith("lit_model")
    for name, tensor in read_tensors(files):
        try:
            ours = [(name, tensor)] if converted else to_lit(name, tensor, config)
        except KeyError:
            problems.append(f"{name} is in no {config.family} model")
            continue
        for key, value in ours:
            if tuple(value.shape) != shapes.get(key):
                problems.append(f"{name} has shape {list(value.shape)}, config.json says {list(shapes.get(key, ()))}")
            elif not is_finite(value):
                problems.append(f"{name} holds NaN or infinite values")
            else:
                assign(model, key, value.to(dtype=dtype or value.dtype, device=device))
                digests[key] = digest(key, value)
            seen.add(key)
    problems += [f"{key} is missing" for key in shapes if key not in seen]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise InputError(f"{checkpoint_dir}: {'; '.join(problems[:5])}{more}. Download or convert the checkpoint again.")
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    model.to(device)  # what is not in the files: the rotary frequencies
    return read_metadata(files[0]).get("lit_gpt.fingerprint") or fingerprint(digests)


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: ours before Hugging Face's, safetensors before .bin."""
    for stem, ending in (("lit_model", "safetensors"), ("model", "safetensors"), ("pytorch_model", "bin")):
        index = checkpoint_dir / f"{stem}.{ending}.index.json"
        if index.is_file():
            files = [checkpoint_dir / name for name in sorted(set(read_json(index)["weight_map"].values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise InputError(f"{checkpoint_dir} lacks {', '.join(missing)}. Download the checkpoint again.")
            return files
        if (checkpoint_dir / f"{stem}.{ending}").is_file():
            return [checkpoint_dir / f"{stem}.{ending}"]
    raise InputError(
        f"{checkpoint_dir} has no weights: no model.safetensors, no pytorch_model.bin and no index of parts of them."
        " `python scripts/download_sample.py` fetches a small checkpoint."
    )


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, in file order."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        if file.suffix == ".bin":
            try:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # weights_only refuses code by many kinds of exception
                raise InputError(f"{file} is damaged, or is no plain file of tensors: {first_line(error)}") from None
            yield from tensors.items()
            continue
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.offset_keys():
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{file} is damaged or incomplete ({first_line(error)}). Download it again.") from None


def read_metadata(file: Path) -> dict[str, str]:
    """The header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or incomplete ({first_line(error)}).") from None


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, file, {"format": "pt"} | metadata)
    except SafetensorError as error:  # its way to report a full disk
        raise InputError(f"{file} could not be written ({first_line(error)}). Free some space and run again.") from None


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replaces a parameter, which may be on the meta device."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are. The extremes tell, and finding them needs no memory."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def digest(name: str, tensor: torch.Tensor) -> str:
    """A tensor's name, shape and 64 evenly spaced values."""
    values = tensor.flatten()[torch.linspace(0, tensor.numel() - 1, 64, dtype=torch.float64).long()]
    return f"{name} {list(tensor.shape)} {values.float().tolist()}"


def fingerprint(digests: dict[str, str]) -> str:
    """sha256 of a base model, whatever the order of its tensors. An adapter is refused by any other base."""
    return hashlib.sha256("\n".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


# --- what a run has trained ------------------------------------------------------------------------------------------


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


class Checkpoints:
    """The folders `last` and `best` of a run.

    Both hold the trained weights with all that is needed to use them, `last` also what is needed to train on.
    """

    def __init__(self, out_dir: Path, model: GPT, description: Finetuned) -> None:
        self.out_dir, self.model, self.description = out_dir, model, description
        self.keep = partial(METHODS[description.method].filter)

    def save(self, name: str) -> None:
        with new_folder(self.out_dir / name) as folder:
            self.write_weights(folder)

    def save_state(self, name: str, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
        """Saves the weights, and with them the optimizer and `progress`, which is JSON."""
        with new_folder(self.out_dir / name) as folder:
            self.write_weights(folder)
            tensors, rest = flatten(optimizer.state_dict())
            metadata = {"optimizer": json.dumps(rest), "progress": json.dumps(progress)}
            save_tensors(tensors, folder / "state.safetensors", metadata)

    def write_weights(self, folder: Path) -> None:
        weights = {key: value for key, value in self.model.state_dict().items() if self.keep(key, value)}
        header = {"lit_gpt": json.dumps(asdict(self.description))}
        save_tensors(weights, folder / f"{self.description.method}.safetensors", header)

    def recover(self) -> None:
        for name in ("last", "best"):
            recover(self.out_dir / name)

    def resume(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Puts the last state back into the model and the optimizer, and returns the progress; None if there is none."""
        last = self.out_dir / "last"
        if not (last / "state.safetensors").is_file():
            return None
        found = read_description(last)
        if found != self.description:
            changed = [key for key, value in asdict(found).items() if value != asdict(self.description)[key]]
            raise InputError(f"{last} was trained with another {' and '.join(changed)}. Use the settings of that run.")
        load_trained(self.model, last, found.method)
        metadata = read_metadata(last / "state.safetensors")
        tensors = dict(read_tensors([last / "state.safetensors"]))
        optimizer.load_state_dict(unflatten(tensors, json.loads(metadata["optimizer"])))
        return json.loads(metadata["progress"])


def flatten(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors by name, and the rest, which JSON can hold."""
    tensors = {f"{i}.{key}": v for i, entry in state["state"].items() for key, v in entry.items() if torch.is_tensor(v)}
    return tensors, {"param_groups": state["param_groups"]}


def unflatten(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state} | rest


def claim_out_dir(out_dir: Path, resume: bool, overwrite: bool) -> None:
    """Makes `out_dir` this run's. Of several processes only the first looks, since it soon writes there.

    Raises:
        InputError: it holds a run, and neither flag says what to do with it.
    """
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) > 0:
        return
    if resume and overwrite:
        raise InputError("--resume true continues the run and --overwrite true replaces it: choose one.")
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir} is a file, expected a folder.")
    if overwrite and out_dir.is_dir():
        for name in RUN_FILES:  # and nothing else: the folder may be somebody's home
            for path in out_dir.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not resume and out_dir.is_dir() and any(out_dir.iterdir()):
        raise InputError(
            f"{out_dir} is not empty. Continue the run in it with --resume true, replace it with --overwrite true, or name"
            " another --out_dir."
        )
    out_dir.mkdir(parents=True, exist_ok=True)


def read_description(finetuned_dir: Path) -> Finetuned:
    """What was trained into this folder."""
    file = finetuned_file(finetuned_dir)
    header = read_metadata(file).get("lit_gpt")
    if header is None:
        raise InputError(f"{file} does not say what it is: it was not written by this toolkit.")
    return Finetuned(**json.loads(header))


def finetuned_file(finetuned_dir: Path) -> Path:
    """The file of trained weights: in this folder, or in `best` of a run's."""
    for folder in (finetuned_dir, finetuned_dir / "best"):
        recover(folder)
        for method in METHODS:
            if (folder / f"{method}.safetensors").is_file():
                return folder / f"{method}.safetensors"
    names = " or ".join(f"{method}.safetensors" for method in METHODS)
    raise InputError(f"{finetuned_dir} holds nothing trained: expected {names} in it or in its folder best.")


def load_finetuned(
    checkpoint_dir: Path | None,
    finetuned_dir: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> tuple[GPT, Finetuned]:
    """A base model with what was trained on it, unmerged. `checkpoint_dir` None is the base it was trained on.

    Raises:
        InputError: another base, or keys that do not fit it.
    """
    description = read_description(finetuned_dir)
    checkpoint_dir = Path(checkpoint_dir or description.checkpoint_dir)
    model = build_model(Config.from_checkpoint(checkpoint_dir))
    base = load_weights(model, checkpoint_dir, dtype, device)
    if base != description.base:
        raise InputError(
            f"{finetuned_dir} was trained on another base than {checkpoint_dir}: on {description.checkpoint_dir}."
        )
    method = METHODS[description.method]
    method.apply(model, method.settings(**description.settings))
    load_trained(model, finetuned_dir, description.method)
    return model.eval(), description


def load_trained(model: GPT, finetuned_dir: Path, method: str) -> None:
    """Puts trained weights into a model that the method has been applied to. Every key must fit, both ways."""
    file = finetuned_file(finetuned_dir)
    expected = {key: value for key, value in model.state_dict(keep_vars=True).items() if METHODS[method].filter(key, value)}
    found = dict(read_tensors([file]))
    unfit = sorted(expected.keys() ^ found.keys())
    unfit += [key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape]
    if unfit:
        raise InputError(f"{file} does not fit this model: {', '.join(unfit[:5])}.")
    with torch.no_grad():
        for key, value in found.items():
            expected[key].copy_(value)


def describe(method: str, settings: Any, checkpoint_dir: Path, base: str, prompt_style: str) -> Finetuned:
    tokenizer = Tokenizer(checkpoint_dir).fingerprint
    return Finetuned(method, asdict(settings), str(checkpoint_dir), base, tokenizer, prompt_style)
