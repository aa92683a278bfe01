"""Shared by several test files."""

import copy
import sys
import types
from pathlib import Path

import torch

from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.runs.header import Header
from lit_gpt.runs.log import read_metrics

FROZEN = {  # precision -> the declared dtype of frozen weights; what trains and theta are float32 under all
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "16-true": torch.float16,
    "16-mixed": torch.float32,
}


DESCRIPTION = Header("lora", {}, "", "", "", "")


def edited(module: types.ModuleType, *changes: tuple[str, str]) -> types.ModuleType:
    """A module with its source changed, as a user would."""
    source = Path(module.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{module.__file__} has {source.count(old)} times {old!r}"
        source = source.replace(old, new)
    changed = types.ModuleType(f"{module.__name__}_edited")
    sys.modules[changed.__name__] = changed  # dataclasses look their module up
    exec(compile(source, module.__file__, "exec"), changed.__dict__)
    return changed


def write_data(data_dir: Path, checkpoint_dir: Path, n_train: int = 40) -> Path:
    """Real text of different lengths: the methods of str, and what Python says about them."""
    methods = [(name, getattr(str, name).__doc__.split("\n")) for name in dir(str) if not name.startswith("_")]
    records = [
        {"instruction": f"What does str.{name} do?", "output": " ".join(doc[: 1 + i % 3]), "split": "train"}
        for i, (name, doc) in enumerate(methods)
    ]
    records = records[:n_train] + [record | {"split": "val"} for record in records[40:]]
    prepare(records, DataArgs(checkpoint_dir=checkpoint_dir, data_dir=data_dir))
    return data_dir


def rows_of(out_dir: Path) -> list[dict]:
    rows = read_metrics(out_dir / "metrics.csv")
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory_gb")} for row in rows]


def column(out_dir: Path, name: str) -> list[float]:
    return [row[name] for row in rows_of(out_dir) if row[name] is not None]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def first(data: Dataset, n: int) -> Dataset:
    data = copy.copy(data)
    data.records = data.records[:n]
    return data


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference, as a share of its tensor's largest entry."""
    assert found.keys() == expected.keys() and len(found) == 2 * 15  # 2 blocks x 7 linears, and the head
    return max(((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item() for key in found)
