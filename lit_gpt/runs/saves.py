"""The folders `last` and `best` of a run: writing them while it trains, and going on from `last`."""

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_gpt.checkpoint.load import is_finite
from lit_gpt.checkpoint.save import SafetensorsWriter, save_tensors, write_files
from lit_gpt.checkpoint.weight_files import read_metadata, read_tensors
from lit_gpt.data.prompts import without_template, write_style
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.distributed import is_first
from lit_gpt.errors import InputError
from lit_gpt.files import new_folder, partial_and_old, recover
from lit_gpt.runs.header import KEY, Header, read_header
from lit_gpt.runs.load_finetuned import load_trained
from lit_gpt.runs.methods import METHODS, Method
from lit_gpt.runs.overwrite import drop_earlier_run
from lit_gpt.runs.slices import SLICES, check_files, load_slices, save_slices, sizes_of_files, stored_tensors
from lit_gpt.sharding import (
    all_processes_are_here,
    computes_split,
    full_parameters,
    full_tensor,
    let_go_of_wholes,
    local_tensor,
    shard_like,
)

STATE = "state.safetensors"  # what `last` holds besides the weights: the optimizer, and how far the run is
GROUPS = "groups"  # in the metadata of that file: see `numbers_of_groups`
FROM_FLAGS = ("lr", "weight_decay", "momentum")  # the numbers of a group that `make_optimizer` sets
SHAPES = "shapes"  # there, too: of the parameters that the optimizer trains
WEIGHTS = "weights."  # how names begin in slices: of the model's parameters,
OPTIMIZER = "optimizer."  # and of the optimizer's state
NUMBER = " number"  # at the end of a name: the optimizer keeps this one as a plain number


class Checkpoints:
    """The folders `last` and `best` of a run.

    Both hold the trained weights with all that is needed to use them, `last` also what is needed to train on. Every
    process of a run must call what saves or resumes, since each may hold a part of the weights; only the first one
    writes.
    """

    def __init__(
        self, out_dir: Path, model: nn.Module, header: Header, method: Method | None = None, in_slices: bool = False
    ) -> None:
        """
        Args:
            out_dir: Where the folders are.
            model: Has the weights.
            header: Says how they are trained, and on what.
            method: None is the one that `header` names, in `runs/methods.py`.
            in_slices: Whether each process writes its own rows of `last`, see `runs/slices.py`. `best` is always whole.
        """
        self.out_dir = out_dir
        self.model = model
        self.header = header
        self.method = method or METHODS[header.method]
        self.in_slices = in_slices
        self.writes = is_first()
        self.has_told_style = False

    def save(self, name: str) -> None:
        """Saves the weights as the folder `name`."""
        with self.open_folder(name) as folder:
            self.write_weights(folder)

    def save_state(self, name: str, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
        """Saves the weights, and with them the optimizer and `progress`, which is JSON."""
        state = dict(name_state(optimizer.state_dict()["state"]))
        metadata = {
            "progress": json.dumps(progress),
            GROUPS: json.dumps(numbers_of_groups(optimizer)),
            SHAPES: json.dumps(shapes_of(optimizer)),
        }
        with self.open_folder(name) as folder:
            if self.in_slices:
                self.write_slices(name, state)
                if folder is not None:
                    metadata[KEY] = json.dumps(asdict(self.header))
                    metadata[SLICES] = json.dumps(sizes_of_files(folder / SLICES))
                state = {}
            else:
                self.write_weights(folder)
            file = None if folder is None else SafetensorsWriter(folder / STATE, metadata, len(state))
            for key, tensor in state.items():
                # put together one after the other by all processes: a device may not hold all of the state
                whole = full_tensor(tensor)
                if file is not None:
                    file.add(key, whole)
            if file is not None:
                file.close()
        if self.writes:
            drop_earlier_run()  # there is something to go on from now

    def open_folder(self, name: str) -> AbstractContextManager[Path | None]:
        """The folder to write to in the first process, None in the others."""
        if not self.writes:
            return nullcontext()
        return new_folder(self.out_dir / name, lock=False)  # the run holds its out_dir

    def write_slices(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """Writes this process' rows of the weights and of the optimizer's state into the folder `name` that is open."""
        all_processes_are_here()  # the first one has made the folder
        partial, _ = partial_and_old(self.out_dir / name)
        let_go_of_wholes(self.model)
        weights = {f"{WEIGHTS}{key}": param.detach() for key, param in self.model.named_parameters()}
        save_slices(weights | {f"{OPTIMIZER}{key}": tensor for key, tensor in state.items()}, partial / SLICES)
        all_processes_are_here()  # all have written

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
        metadata = read_metadata(last / STATE)
        header = Header(**json.loads(metadata[KEY])) if KEY in metadata else read_header(last)
        self.check_same_header(last, header)
        if SHAPES in metadata and json.loads(metadata[SHAPES]) != shapes_of(optimizer):
            raise InputError(f"{last / STATE} is of another run. Put this one's back, or begin anew with --overwrite.")

        # the weights, and what the optimizer keeps for each of them
        if SLICES in metadata:
            check_files(last / SLICES, json.loads(metadata[SLICES]))
            tensors = self.load_from_slices(last / SLICES, optimizer)
        else:
            load_trained(self.model, last, self.method)
            tensors = dict(self.whole_state(last / STATE, optimizer))
        settings = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": nest_state(tensors), "param_groups": settings})

        put_numbers_back(optimizer, json.loads(metadata.get(GROUPS, "[]")))  # saves of November 2026 have none
        return json.loads(metadata["progress"])

    def whole_state(self, file: Path, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimizer's state from a file of whole tensors, split among the devices as its parameters are."""
        params = params_of(optimizer)
        for name, tensor in read_tensors([file], let_go=computes_split(self.model)):
            param = params[number_of_param(name)]
            if tensor.shape == param.shape:
                tensor = shard_like(tensor, param)
            check_is_finite(name, tensor, file)
            yield name, tensor

    def load_from_slices(self, folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """Loads the weights into the model, and returns the optimizer's state, from what `write_slices` wrote."""
        let_go_of_wholes(self.model)
        tensors = {f"{WEIGHTS}{key}": param.detach() for key, param in self.model.named_parameters()}

        # room for the state: like a parameter, if it has its shape
        params = params_of(optimizer)
        for name, stored in stored_tensors(folder).items():
            if not name.startswith(OPTIMIZER):
                continue
            param = params[number_of_param(name.removeprefix(OPTIMIZER))]
            dtype = stored.properties.dtype
            if stored.size == param.shape:
                tensors[name] = torch.empty_like(param.detach(), dtype=dtype)
            else:
                tensors[name] = torch.empty(stored.size, dtype=dtype)

        load_slices(tensors, folder)
        for name, tensor in tensors.items():
            check_is_finite(name, tensor, folder)
        return {name.removeprefix(OPTIMIZER): tensors[name] for name in tensors if name.startswith(OPTIMIZER)}

    def check_same_header(self, last: Path, header: Header) -> None:
        """Raises InputError if the run in `last` is not this one. Its base may have moved: it has a fingerprint."""
        saved = asdict(header)
        now = asdict(self.header)
        for header in (saved, now):
            del header["checkpoint_dir"]
        changed = [key for key in saved if saved[key] != now[key]]
        if changed:
            others = " and another ".join(changed)
            raise InputError(
                f"{last} was trained with another {others}. Go on with that run's, or begin anew with --overwrite."
            )


def name_state(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The state of an optimizer as named tensors: {0: {"step": 3.0}} gives "0.step number".

    Some optimizers nest dictionaries, such as the 8-bit ones of bitsandbytes. Where weights are split, so are they.
    """
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from name_state(value, f"{name}.")
        elif torch.is_tensor(value):
            yield name, value
        elif value is not None:
            # a file of tensors holds no plain numbers; the name says that it was one. Python's have 64 bits
            yield name + NUMBER, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer trains, which it numbers through all its groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def check_is_finite(name: str, tensor: torch.Tensor, source: Path) -> None:
    """Raises InputError if this process' part of a tensor holds a value that is not finite."""
    if not is_finite(local_tensor(tensor)):
        raise InputError(f"{source} holds NaN or infinite values: {name}. Begin anew with --overwrite.")


def number_of_param(name: str) -> int:
    """Which parameter of an optimizer a tensor of `name_state` belongs to."""
    return int(name.partition(".")[0])


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
    return [list(param.shape) for param in params_of(optimizer)]


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
