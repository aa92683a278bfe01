"""The training loop and finetune/lora.py, on tiny models and a CPU: `pytest tests/test_train.py`

The part that needs two processes is this file itself, run as a script by `two_ranks`.
"""

import dataclasses
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lit_gpt.train
from lit_gpt import Config, InputError, cli
from lit_gpt.checkpoint import build_model, load_model, load_weights
from lit_gpt.data import DataArgs, Dataset, micro_batches, prepare, step_records
from lit_gpt.device import launch, weight_dtype
from lit_gpt.finetuned import Checkpoints, Finetuned, load_finetuned
from lit_gpt.generate import generate
from lit_gpt.layout import Segment
from lit_gpt.log import read_metrics
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.model import GPT
from lit_gpt.train import TrainArgs, learning_rate, make_optimizer

ROOT = Path(__file__).parents[1]
EVERYWHERE = LoRA(r=4, alpha=8, query=True, key=True, value=True, projection=True, mlp=True, head=True)
TRAIN = TrainArgs(learning_rate=5e-3, global_batch_size=8, micro_batch_size=4, max_steps=4, warmup_steps=2)
FROZEN = {  # precision -> the declared dtype of frozen weights; what trains and theta are float32 under all
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "16-true": torch.float16,
    "16-mixed": torch.float32,
}
STEPS = {"8x1": (8, 1), "2x4": (8, 4), "1x8": (8, 8), "5x1": (5, 1), "1x5": (5, 8)}  # passes -> records, size of one


def script(path: Path) -> types.ModuleType:
    """A script as a module, from its path."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edited(module: types.ModuleType, *changes: tuple[str, str]) -> types.ModuleType:
    """A module with its source changed, as a user would."""
    source = Path(module.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{module.__file__} has {source.count(old)} times {old!r}"
        source = source.replace(old, new)
    copy = types.ModuleType(f"{module.__name__}_edited")
    copy.__dict__["__file__"] = module.__file__
    sys.modules[copy.__name__] = copy  # dataclasses look their module up
    exec(compile(source, module.__file__, "exec"), copy.__dict__)
    return copy


finetune = script(ROOT / "finetune/lora.py").main


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    """Real text of different lengths: the methods of str, and what Python says about them."""
    methods = [(name, getattr(str, name).__doc__.split("\n")) for name in dir(str) if not name.startswith("_")]
    splits = ["train"] * 40 + ["val"] * (len(methods) - 40)
    records = [
        {"instruction": f"What does str.{name} do?", "output": " ".join(doc[: 1 + i % 3]), "split": split}
        for i, ((name, doc), split) in enumerate(zip(methods, splits, strict=True))
    ]
    data_dir = tmp_path_factory.mktemp("data") / "str"
    prepare(records, tiny_dir, data_dir, DataArgs())
    return data_dir


def adapted(tiny_dir: Path, lora: LoRA = EVERYWHERE, dtype: torch.dtype | None = None) -> GPT:
    """What finetune/lora.py trains."""
    torch.manual_seed(0)
    model = build_model(Config.from_checkpoint(tiny_dir))
    load_weights(model, tiny_dir, dtype)
    apply_lora(model, lora)
    mark_only_lora_as_trainable(model)
    return model


def run_fit(model: GPT, data_dir: Path, out_dir: Path, args: TrainArgs = TRAIN, resume: bool = False) -> list[dict]:
    """Trains on one process and returns the rows of metrics.csv, but for the clock's and the memory's columns."""
    train_data, val_data = Dataset(data_dir, "train"), Dataset(data_dir, "val")
    checkpoints = Checkpoints(out_dir, model, Finetuned("lora", {}, "", "", "", ""))
    lit_gpt.train.fit(launch(1, "32-true"), model, train_data, val_data, args, checkpoints, resume)
    return rows_of(out_dir)


def rows_of(out_dir: Path) -> list[dict]:
    rows = read_metrics(out_dir / "metrics.csv")
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory_gb")} for row in rows]


def column(out_dir: Path, name: str) -> list[float]:
    return [row[name] for row in rows_of(out_dir) if row[name] is not None]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- exactness: one step's gradient is the same however it is computed


def exact_model(tiny_dir: Path) -> GPT:
    model = adapted(tiny_dir).double()
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):  # zero, it would make the gradient of A zero too
            torch.nn.init.normal_(param, std=0.1)
    return model


def step_gradients(
    fabric: Any, tiny_dir: Path, train_data: Dataset, out_dir: Path, n_records: int, size: int, fit: Callable = lit_gpt.train.fit
) -> dict[str, torch.Tensor]:
    """The gradients that the loop hands to the optimizer in its first step, in float64."""
    model, gradients = exact_model(tiny_dir), {}
    train_data.records = train_data.records[:n_records]
    none = Dataset(train_data_dir(train_data), "val")
    none.records = none.records[:0]
    handle = register_optimizer_step_pre_hook(
        lambda *_: gradients.update((n, p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad)
    )
    args = TrainArgs(global_batch_size=n_records, micro_batch_size=size, max_steps=1, max_norm=None)
    fit(fabric, model, train_data, none, args, Checkpoints(out_dir, model, Finetuned("lora", {}, "", "", "", "")))
    handle.remove()
    return gradients
