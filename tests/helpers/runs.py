"""Runs of the training loop: their data, what they leave behind, and the loop with lines changed."""

import copy
import sys
import types
from pathlib import Path

import torch

from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.runs.header import Header
from lit_gpt.runs.log import read_metrics

# --precision -> the declared dtype of frozen weights. Trained weights of a method and rotary frequencies are float32
FROZEN = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "16-true": torch.float16,
    "16-mixed": torch.float32,
}


# the header of a run whose base, data and tokenizer do not matter
DESCRIPTION = Header("lora", {}, "", "", "", "")


def edited(module: types.ModuleType, *changes: tuple[str, str]) -> types.ModuleType:
    """A copy of a module in which each old text is replaced by a new one, as a user would edit the file.

    An old text must occur once.
    """
    source = Path(module.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{module.__file__} has {source.count(old)} times {old!r}"
        source = source.replace(old, new)
    changed = types.ModuleType(f"{module.__name__}_edited")
    sys.modules[changed.__name__] = changed  # the decorator `dataclass` looks its module up there
    exec(compile(source, module.__file__, "exec"), changed.__dict__)
    return changed


def write_data(data_dir: Path, checkpoint_dir: Path, n_train: int = 40) -> Path:
    """Prepares records of different lengths, the methods of str and their docstrings: `n_train` for training, and those
    from the 41st on for validation.
    """
    methods = [(name, getattr(str, name).__doc__.split("\n")) for name in dir(str) if not name.startswith("_")]
    records = [
        {"instruction": f"What does str.{name} do?", "output": " ".join(doc[: 1 + i % 3]), "split": "train"}
        for i, (name, doc) in enumerate(methods)
    ]
    records = records[:n_train] + [record | {"split": "val"} for record in records[40:]]
    prepare(records, DataArgs(checkpoint_dir=checkpoint_dir, data_dir=data_dir))
    return data_dir


def rows_of(out_dir: Path) -> list[dict]:
    """The rows of metrics.csv, without the columns that the clock and the memory decide."""
    rows = read_metrics(out_dir / "metrics.csv")
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory_gb")} for row in rows]


def column(out_dir: Path, name: str) -> list[float]:
    """The figures in one column of metrics.csv, where a row has one."""
    return [row[name] for row in rows_of(out_dir) if row[name] is not None]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same tensors under the same names, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def first(data: Dataset, n: int) -> Dataset:
    """The first n records of a data set."""
    data = copy.copy(data)
    data.records = data.records[:n]
    return data


def error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference between the gradients of a LoRA everywhere, as a share of its tensor's largest entry."""
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 2 * 15  # A and B of 2 blocks x 7 linears, and of the head
    differences = {key: (gradients[key] - expected[key]).abs().max() for key in gradients}
    return max((difference / expected[key].abs().max()).item() for key, difference in differences.items())
