"""A prepared folder with some of another one's training records: the same arrays, with other codes in split.bin."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np

from lit_gpt.data.dataset import NEITHER, Dataset
from lit_gpt.files import must_be_empty, new_folder


def most_helpful(influence: np.ndarray, share: float) -> np.ndarray:
    """The numbers of the records that lower the target's loss the most: this share of them, and one at the least."""
    n = max(1, round(share * len(influence)))
    return np.sort(np.argsort(-influence, kind="stable")[:n])


def without_most(suspicion: np.ndarray, share: float) -> np.ndarray:
    """The numbers of the records that are left without this share of them, those with the highest scores."""
    n = min(len(suspicion) - 1, round(share * len(suspicion)))
    return np.sort(np.argsort(-suspicion, kind="stable")[n:])


def write_subset(dataset: Dataset, keep: Collection[int], folder: Path, why: str) -> None:
    """Writes a folder of prepared data that trains on some records of `dataset`; those for validation stay.

    Args:
        dataset: The training records.
        keep: The numbers of those to train on, within `dataset`.
        folder: It must not hold anything.
        why: How they were chosen, for meta.json.

    Raises:
        InputError: `folder` is not empty.
    """
    must_be_empty(folder)
    codes = np.array(dataset.split)
    left_out = np.setdiff1d(np.arange(len(dataset)), list(keep))
    codes[dataset.records[left_out]] = NEITHER
    meta = dataset.meta | {"n_train": len(keep), "chosen": why}
    with new_folder(folder) as partial:
        for name in ("tokens", "trained", "ends"):
            shutil.copyfile(dataset.data_dir / f"{name}.bin", partial / f"{name}.bin")
        codes.tofile(partial / "split.bin")
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
