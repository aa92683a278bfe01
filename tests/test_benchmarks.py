"""What the benchmarks compare is the same thing in every program: `pytest tests/test_benchmarks.py`, about 15 s

Of the peers transformers alone is installed beside the tests; it is asked in this process, through the same questions.
"""

import argparse
import importlib
import json
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT, VOCAB_SIZE

from lit_gpt import Config

N_RECORDS = 4


@pytest.fixture
def benchmark_module(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a file of tests/benchmarks/, where each finds the others beside it."""
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    return importlib.import_module


@pytest.fixture
def work(tmp_path, tied_dir, benchmark_module) -> argparse.Namespace:
    """The arguments of a worker, and the files that it reads: records that begin alike, and the A of LoRA."""
    chance = np.random.default_rng(0)
    records = []
    for length in chance.integers(12, 30, 3 * N_RECORDS):
        ids = [*range(8), *chance.integers(0, VOCAB_SIZE, length - 8).tolist()]
        records.append({"ids": ids, "trained": [0] * 6 + [1] * (len(ids) - 6)})
    data = tmp_path / "given.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    benchmark_module("throughput").write_inputs(argparse.Namespace(data=data, checkpoint_dir=tied_dir), tmp_path)
    return argparse.Namespace(checkpoint_dir=tied_dir, work_dir=tmp_path, records_per_step=N_RECORDS)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_throughput_trains_the_same_model_alike(work, benchmark_module, method) -> None:
    """All settings have one loss before an update, and the same losses after the same updates."""
    throughput = benchmark_module("throughput")
    work.task = method
    first = []  # by every setting and micro-batch size
    after_updates = []
    for program, file, best in (("ours", "ours", "shared"), ("hf", "peer_hf", "flat")):
        train = getattr(benchmark_module(file), method)(work)
        for setting in throughput.SETTINGS[program]:
            for size in (N_RECORDS, 1):
                answer = train({"setting": setting, "micro_batch": size, "first": 0, "steps": 1, "update": False})
                first += answer["losses"]
        answer = train({"setting": best, "micro_batch": 2, "first": 0, "steps": 3, "update": True})
        first.append(answer["losses"][0])
        after_updates.append(answer["losses"][1:])
    assert max(first) / min(first) - 1 < throughput.TOLERANCE
    ours, theirs = after_updates
    assert ours == pytest.approx(theirs, rel=throughput.TOLERANCE)


def test_throughput_trains_at_all(work, benchmark_module) -> None:
    """The losses of the same records go down: the updates are made."""
    work.task = "full"
    train = benchmark_module("ours").full(work)
    question = {"setting": "shared", "micro_batch": 4, "first": 0, "steps": 3, "update": True}
    before = train(question)["losses"]
    after = train(question)["losses"]
    assert np.mean(after) < np.mean(before)


def test_throughput_refuses_what_no_peer_can_do(benchmark_module, monkeypatch) -> None:
    throughput = benchmark_module("throughput")
    monkeypatch.setattr("sys.argv", ["throughput.py", "--method", "qlora", "--programs", "ours", "litgpt"])
    with pytest.raises(SystemExit, match="litgpt quantizes on CUDA alone"):
        throughput.arguments()
    monkeypatch.setattr("sys.argv", ["throughput.py", "--method", "qlora"])
    assert throughput.arguments().programs == ["ours", "hf", "trainer"]
    with pytest.raises(SystemExit, match="expected such as hf=lean:2"):
        throughput.chosen_by_hand(["hf=chunked:2"])


def test_operations_are_those_of_the_formula(work, benchmark_module) -> None:
    """A multiplication and an addition for each weight and token: in forward, and for the gradient of each input."""
    T = 32
    record = {"ids": list(range(T)), "trained": [1] * T}
    (work.work_dir / "records.jsonl").write_text(json.dumps(record) + "\n")
    answer = benchmark_module("ours").operations(work)({"setting": "shared", "micro_batch": 1})
    operations = {kind: answer["forward"][kind] + answer["backward"][kind] for kind in ("frozen", "head", "attention")}

    config = Config.from_name("meta-llama/Llama-3.1-8B")
    C, V, heads, hs = config.n_embd, config.vocab_size, config.n_head, config.head_size
    qkv = C * hs * (heads + 2 * config.n_query_groups)
    block = qkv + heads * hs * C + 3 * C * config.intermediate_size
    # nothing before the first block trains: its input needs no gradient, nor do its keys, which are not adapted
    assert operations["frozen"] == 2 * T * (2 * config.n_layer * block - qkv)
    assert operations["head"] == 2 * 2 * (T - 1) * C * V
    products = 6 * config.n_layer - 1
    assert operations["attention"] == pytest.approx(products * 2 * heads * T * T * hs, rel=1e-3)
