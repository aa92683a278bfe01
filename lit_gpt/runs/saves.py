"""TODO doc of runs.saves"""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoint.load import read_metadata, read_tensors
from lit_gpt.checkpoint.save import save_tensors, write_files
from lit_gpt.distributed import full_parameters, full_tensor, is_first, shard_like
from lit_gpt.errors import InputError
from lit_gpt.files import new_folder, recover
from lit_gpt.model.gpt import GPT
from lit_gpt.runs.finetuned import Finetuned, load_trained, read_description
from lit_gpt.runs.methods import METHODS, Method

NUMBER = " number"  # in the name of what an optimizer keeps as a plain number


class Checkpoints:
    """The folders `last` and `best` of a run.

    Both hold the trained weights with all that is needed to use them, `last` also what is needed to train on. Every
    process of a run must call its methods, since each may hold a part of the weights; only the first one writes.
    """

    def __init__(self, out_dir: Path, model: GPT, description: Finetuned, method: Method | None = None) -> None:
        self.out_dir, self.model, self.description, self.writes = out_dir, model, description, is_first()
        self.method = method or METHODS[description.method]
        self.keep = self.method.filter

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
        weights = full_parameters(self.model, self.keep)
        header = {"lit_gpt": json.dumps(asdict(self.description))}
        if folder is None:
            for _ in weights:  # only to take part
                pass
        elif self.method.trains_base:
            write_files(weights, self.model.config, Path(self.description.checkpoint_dir), folder, metadata=header)
        else:
            save_tensors(dict(weights), folder / f"{self.description.method}.safetensors", header)

    def load(self, name: str) -> None:
        """Puts the weights of one of the folders back into the model."""
        load_trained(self.model, self.out_dir / name, self.method)

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
        load_trained(self.model, last, self.method)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        state = unflatten(dict(read_tensors([last / "state.safetensors"])))
        for index, entry in state.items():
            like = params[index]
            entry |= {k: shard_like(v, like) for k, v in entry.items() if getattr(v, "shape", None) == like.shape}
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
            found[f"{prefix}{key}{'' if is_tensor else NUMBER}"] = (
                full_tensor(value) if is_tensor else torch.tensor(value)
            )
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
