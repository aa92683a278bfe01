"""The folders `last` and `best` of a run: writing them while it trains, and going on from `last`."""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_gpt.checkpoint.load import is_finite
from lit_gpt.checkpoint.save import save_tensors, write_files
from lit_gpt.checkpoint.weight_files import read_metadata, read_tensors
from lit_gpt.data.prompts import without_template, write_style
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.distributed import is_first
from lit_gpt.errors import InputError
from lit_gpt.files import new_folder, recover
from lit_gpt.runs.header import KEY, Header, read_header
from lit_gpt.runs.load_finetuned import load_trained
from lit_gpt.runs.methods import METHODS, Method
from lit_gpt.runs.overwrite import drop_earlier_run
from lit_gpt.sharding import full_parameters, full_tensor, shard_like

STATE = "state.safetensors"  # what `last` holds besides the weights: the optimizer, and how far the run is
GROUPS = "groups"  # in the metadata of that file: see `numbers_of_groups`
FROM_FLAGS = ("lr", "weight_decay", "momentum")  # the numbers of a group that `make_optimizer` sets
SHAPES = "shapes"  # there, too: of the parameters that the optimizer trains
NUMBER = " number"  # at the end of a name: the optimizer keeps this one as a plain number


class Checkpoints:
    """The folders `last` and `best` of a run.

    Both hold the trained weights with all that is needed to use them, `last` also what is needed to train on. Every
    process of a run must call what saves or resumes, since each may hold a part of the weights; only the first one
    writes.
    """

    def __init__(self, out_dir: Path, model: nn.Module, header: Header, method: Method | None = None) -> None:
        """`method` None is the one that `header` names, in `runs/methods.py`."""
        self.out_dir = out_dir
        self.model = model
        self.header = header
        self.method = method or METHODS[header.method]
        self.writes = is_first()
        self.has_told_style = False

    def save(self, name: str) -> None:
        """Saves the weights as the folder `name`."""
        with self.open_folder(name) as folder:
            self.write_weights(folder)

    def save_state(self, name: str, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
        """Saves the weights, and with them the optimizer and `progress`, which is JSON."""
        with self.open_folder(name) as folder:
            self.write_weights(folder)
            state = optimizer.state_dict()["state"]
            tensors = name_state(state)
            metadata = {
                "progress": json.dumps(progress),
                GROUPS: json.dumps(numbers_of_groups(optimizer)),
                SHAPES: json.dumps(shapes_of(optimizer)),
            }
            if folder is not None:
                save_tensors(tensors, folder / STATE, metadata)
        if self.writes:
            drop_earlier_run()  # there is something to go on from now

    def open_folder(self, name: str) -> AbstractContextManager[Path | None]:
        """The folder to write to in the first process, None in the others."""
        if not self.writes:
            return nullcontext()
        return new_folder(self.out_dir / name, lock=False)  # the run holds its out_dir

    def write_weights(self, folder: Path | None) -> None:
        """Writes what the method trains as one file, or all weights as a Hugging Face folder."""
        weights = full_parameters(self.model, self.method.filter)
        metadata = {KEY: json.dumps(asdict(self.header))}
        if folder is None:
            # putting together a parameter that is split takes all processes, also those that do not write it
            for _ in weights:
                pass
        elif self.method.trains_base:
            source = Path(self.header.checkpoint_dir)
            write_files(weights, self.model.config, source, folder, metadata=metadata)
            write_style(self.header.prompt_style, folder)  # its chat template asks as in training
            if not self.has_told_style:  # once a run: the tokenizer is read for it
                sentence = without_template(self.header.prompt_style, Tokenizer(folder))
                if sentence:
                    print(sentence, file=sys.stderr)
                self.has_told_style = True
        else:
            file = folder / f"{self.header.method}.safetensors"
            save_tensors(dict(weights), file, metadata)

    def load(self, name: str) -> None:
        """Loads the weights of the folder `name` into the model."""
        folder = self.out_dir / name
        load_trained(self.model, folder, self.method)

    def recover(self) -> None:
        """Clears away what a killed process left of a save."""
        for name in ("last", "best"):
            recover(self.out_dir / name)

    def resume(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Loads `last` into the model and the optimizer, and returns the progress; None if there is no `last`.

        Raises:
            InputError: `last` was trained with another method, base, tokenizer or prompt style, does not fit, holds
                values that are not finite, or has lost its state or has another run's.
        """
        last = self.out_dir / "last"
        if not last.exists():
            return None
        if not (last / STATE).is_file():
            raise InputError(
                f"{last} has no {STATE}, from which a run goes on. Put it back, or begin anew with --overwrite."
            )
        self.check_same_header(last)
        load_trained(self.model, last, self.method)

        metadata = read_metadata(last / STATE)
        if SHAPES in metadata and json.loads(metadata[SHAPES]) != shapes_of(optimizer):
            raise InputError(f"{last / STATE} is of another run. Put this one's back, or begin anew with --overwrite.")

        # the optimizer numbers the parameters through all its groups
        params: list[nn.Parameter] = []
        for group in optimizer.param_groups:
            params += group["params"]
        # what it keeps for a parameter is split among the devices as that parameter is
        tensors = dict(read_tensors([last / STATE]))
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise InputError(f"{last / STATE} holds NaN or infinite values: {name}. Begin anew with --overwrite.")
        state = nest_state(tensors)
        for index, entry in state.items():
            param = params[index]
            for key, value in entry.items():
                if torch.is_tensor(value) and value.shape == param.shape:
                    entry[key] = shard_like(value, param)
        settings = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": settings})

        put_numbers_back(optimizer, json.loads(metadata.get(GROUPS, "[]")))  # saves of November 2026 have none
        return json.loads(metadata["progress"])

    def check_same_header(self, last: Path) -> None:
        """Raises InputError if the run in `last` is not this one. Its base may have moved: it has a fingerprint."""
        saved = asdict(read_header(last))
        now = asdict(self.header)
        for header in (saved, now):
            del header["checkpoint_dir"]
        changed = [key for key in saved if saved[key] != now[key]]
        if changed:
            others = " and another ".join(changed)
            raise InputError(
                f"{last} was trained with another {others}. Go on with that run's, or begin anew with --overwrite."
            )


def name_state(state: dict[Any, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The state of an optimizer as named tensors, put together: {0: {"step": 3.0}} gives "0.step number".

    Some optimizers nest dictionaries, such as the 8-bit ones of bitsandbytes. Every process must call it.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            tensors |= name_state(value, f"{name}.")
        elif torch.is_tensor(value):
            tensors[name] = full_tensor(value)
        elif value is not None:
            # a file of tensors holds no plain numbers; the name says that it was one. Python's have 64 bits
            name += NUMBER
            tensors[name] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return tensors


def nest_state(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, Any]]:
    """The inverse of `name_state`: the state of an optimizer, by the number of the parameter."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, *path, key = name.split(".")
        entry = state.setdefault(int(index), {})
        for part in path:
            entry = entry.setdefault(part, {})
        if key.endswith(NUMBER):
            key = key.removesuffix(NUMBER)
            entry[key] = tensor.item()
        else:
            entry[key] = tensor
    return state


def shapes_of(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    """The shape of each parameter that an optimizer trains, in its order."""
    return [list(param.shape) for group in optimizer.param_groups for param in group["params"]]


def numbers_of_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """The numbers that an optimizer keeps for each of its groups, but for the settings that hyperparameters.yaml has.

    Some count and estimate there, such as the rate that Prodigy finds.
    """
    groups = []
    for group in optimizer.param_groups:
        numbers = {key: value.item() if is_one_number(value) else value for key, value in group.items()}
        own = {key: value for key, value in numbers.items() if key not in FROM_FLAGS}
        groups.append({key: value for key, value in own.items() if isinstance(value, int | float)})
    return groups


def put_numbers_back(optimizer: torch.optim.Optimizer, groups: list[dict[str, float]]) -> None:
    """The inverse of `numbers_of_groups`."""
    for group, numbers in zip(optimizer.param_groups, groups):
        for key, value in numbers.items():
            now: Any = group.get(key)
            group[key] = torch.full_like(now, value) if is_one_number(now) else value


def is_one_number(value: Any) -> bool:
    """Whether a value is a tensor of one element."""
    return torch.is_tensor(value) and value.numel() == 1
