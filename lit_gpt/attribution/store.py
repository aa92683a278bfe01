"""Gradients of all training records on the disk: made once for a run, and asked often.

gradients.bin    float32 (n_records, size)    the sketch of each record's gradient
losses.bin       float32 (n_records)          the loss of each, summed over its targets
state.json       whose gradients these are, and of how many records they are there
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_gpt.attribution.gradients import RecordGradients
from lit_gpt.data.dataset import Dataset
from lit_gpt.errors import InputError
from lit_gpt.files import has_content, write_whole
from lit_gpt.lock import hold
from lit_gpt.lora import LoRALinear

GRADIENTS = "gradients"  # the folder, in the out_dir of an attribution
STATE = "state.json"
SAVE_EVERY = 20  # micro-batches


class GradientStore:
    """The gradients of the training records of a run, mapped into memory."""

    def __init__(self, folder: Path, key: str, n_records: int, size: int) -> None:
        """Opens what is in `folder`, or begins anew if those are gradients of something else.

        Args:
            folder: It is made if it is not there.
            key: Says whose gradients they are, see `key_of`.
            n_records: How many the training data have.
            size: Numbers of a sketch.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.identity: dict[str, Any] = {"key": key, "n_records": n_records, "size": size}
        self.n_done = self.stored()
        if not self.n_done:
            (folder / STATE).unlink(missing_ok=True)  # it speaks of gradients that go away now
        mode: Literal["r+", "w+"] = "r+" if self.n_done else "w+"
        self.gradients = np.memmap(folder / "gradients.bin", np.float32, mode, shape=(n_records, size))
        self.losses = np.memmap(folder / "losses.bin", np.float32, mode, shape=(n_records,))

    def stored(self) -> int:
        """The number of records whose gradients are there already."""
        file = self.folder / STATE
        gradients = self.folder / "gradients.bin"
        if not file.is_file() or not gradients.is_file():
            return 0
        state = json.loads(file.read_text(encoding="utf-8"))
        n_bytes = 4 * self.identity["n_records"] * self.identity["size"]
        is_same = all(state.get(name) == value for name, value in self.identity.items())
        return int(state["n_done"]) if is_same and gradients.stat().st_size == n_bytes else 0

    def fill(self, dataset: Dataset, source: RecordGradients, micro_batch_size: int) -> Iterator[int]:
        """Makes the gradients that are missing, and gives the number of each record whose gradient is there."""
        n_records = len(self.losses)
        for number, start in enumerate(range(self.n_done, n_records, micro_batch_size), 1):
            end = min(start + micro_batch_size, n_records)
            sketches, losses = source.of([dataset[i] for i in range(start, end)])
            self.gradients[start:end] = sketches.cpu().numpy()
            self.losses[start:end] = losses.cpu().numpy()
            self.n_done = end
            if number % SAVE_EVERY == 0 or end == n_records:
                self.save()
            yield from range(start, end)

    def save(self) -> None:
        """From here on an interrupted pass goes on."""
        # the numbers reach the disk before the file that says that they are there
        self.gradients.flush()
        self.losses.flush()
        write_whole(self.folder / STATE, json.dumps(self.identity | {"n_done": self.n_done}, indent=2) + "\n")


def claim_attribution(out_dir: Path) -> None:
    """Keeps other processes from writing to the folder until this one ends.

    Raises:
        InputError: it holds something else, or another process writes there.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir} is a file, expected a folder. Name another --out_dir.")
    if has_content(out_dir) and not (out_dir / GRADIENTS).is_dir():
        raise InputError(f"{out_dir} is not empty, and holds no attribution. Name another --out_dir.")
    hold(out_dir)


def key_of(linears: Mapping[str, LoRALinear], *facts: str) -> str:
    """A fingerprint of the trained factors of these linears, and of what else the gradients depend on."""
    digest = hashlib.sha256()
    for name, linear in linears.items():
        digest.update(name.encode())
        for factor in (linear.lora_A, linear.lora_B):
            digest.update(factor.detach().cpu().numpy().tobytes())
    for fact in facts:
        digest.update(f"{fact}\n".encode())
    return digest.hexdigest()
