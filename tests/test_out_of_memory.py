"""Memory that does not suffice ends in one line: `pytest tests/test_out_of_memory.py`, about 10 s

No test fills a card: what torch says of one is put in its place.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers.methods import TRAIN
from helpers.runs import DESCRIPTION, write_data

import lit_gpt.train
from lit_gpt import InputError
from lit_gpt.checkpoint.load import load_model
from lit_gpt.checkpoint.weight_files import read_bin
from lit_gpt.cli import line_to_mend
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.read_files import file_of_dataset, read_records
from lit_gpt.distributed import launch
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.make_optimizer import check_optimizer
from lit_gpt.runs.saves import Checkpoints

OF_TORCH = (
    "CUDA out of memory. Tried to allocate 1.25 GiB. GPU 0 has a total capacity of 23.64 GiB of which 800.00 MiB is"
    " free. Of the allocated memory 21.33 GiB is allocated by PyTorch, and 1.12 GiB is reserved but unallocated."
)
PIECES = "PYTORCH_ALLOC_CONF=expandable_segments:True before the command joins them."


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 25.38 GB, as torch tells of it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=25_383_000_000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 22_900_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 24_100_000_000)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


def test_a_gpu_says_what_it_had_and_what_to_lower(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    line = line_to_mend(torch.OutOfMemoryError(OF_TORCH))
    assert line.startswith(
        "This command does not fit: the GPU has 25.4 GB, of which this process has held 22.9 and reserved 24.1 at its"
        " peak, and 1.34 GB more were asked for. Lower the batch (--train.micro_batch_size) or the length"
    )
    assert "tutorials/out_of_memory.md" in line and "scripts/plan_memory.py" in line and line.endswith(PIECES)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    assert "expandable_segments" not in line_to_mend(torch.OutOfMemoryError(OF_TORCH))


@pytest.mark.parametrize(
    "text",
    [  # what is not of torch's own allocator
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
        "MPS backend out of memory (MPS allocated: 18.00 GB). Tried to allocate 256.00 MB on private pool.",
    ],
)
def test_other_libraries_of_a_gpu(text: str) -> None:
    line = line_to_mend(RuntimeError(text))
    assert line.startswith("This command does not fit: the memory of the GPU is full. Lower the batch")
    assert "expandable_segments" not in line, "only CUDA's allocator has them"


def test_the_memory_of_the_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    missing = "This command does not fit: this machine has no 1,152,921,504.61 GB of memory left. Lower "
    assert line_to_mend(caught.value).startswith(missing)
    with pytest.raises(MemoryError) as caught:
        np.empty(2**60, dtype=np.uint8)
    assert line_to_mend(caught.value).startswith("This command does not fit: this machine has no memory left. Lower ")


def test_another_error_is_a_bug() -> None:
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        KeyError("a"),
    ):
        assert line_to_mend(error) is None


def test_a_full_card_is_no_fault_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_card(*_: Any) -> None:
        raise torch.OutOfMemoryError(OF_TORCH)

    monkeypatch.setattr(torch.optim.AdamW, "step", fill_the_card)
    with pytest.raises(torch.OutOfMemoryError):
        check_optimizer("torch.optim.AdamW")


def fill_the_machine(*_: Any, **__: Any) -> None:
    raise pyarrow.ArrowMemoryError("malloc of size 8589934592 failed")


def test_a_full_machine_is_no_fault_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that `torch.save` wrote, a parquet file, another file of a data set, and a set saved to disk."""
    weights = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(2)}, weights)
    of_one_record = datasets.Dataset.from_list([{"text": "a"}])
    of_one_record.save_to_disk(tmp_path / "saved")
    of_one_record.to_parquet(tmp_path / "records.parquet")

    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", fill_the_machine)
    for loading in ("load_dataset", "load_from_disk"):
        monkeypatch.setattr(datasets, loading, fill_the_machine)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        read_bin(weights)
    for records in (
        read_records(tmp_path / "records.parquet"),
        read_records(tmp_path / "saved"),
        file_of_dataset(tmp_path / "records.arrow", "arrow", {}),
    ):
        with pytest.raises(MemoryError):
            list(records)


def test_a_step_of_a_training(card: None, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the flag that helps most there."""
    data_dir = write_data(tmp_path / "data", tiny_dir)
    model = load_model(tiny_dir)
    apply_lora(model, LoRA())
    mark_only_lora_as_trainable(model)

    def fill_the_card(module: torch.nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():  # no validation
            raise torch.OutOfMemoryError(OF_TORCH)

    model.register_forward_pre_hook(fill_the_card)
    args = replace(TRAIN, max_steps=1)
    checkpoints = Checkpoints(tmp_path / "out", model, DESCRIPTION)
    with pytest.raises(
        InputError, match=r"Step 1 does not fit: the GPU has 25\.4 GB, .*, and 1\.34 GB more were"
    ) as stop:
        lit_gpt.train.fit(
            launch(1, "32-true"), model, Dataset(data_dir, "train"), Dataset(data_dir, "val"), args, checkpoints
        )
    assert "Lower --train.micro_batch_size (or --train.micro_batch_tokens); tutorials/" in str(stop.value)
