"""The training loop and finetune/lora.py, on tiny models and a CPU: `pytest tests/test_train.py`, about 1 min

The part that needs two processes is this file itself, run as a script by `two_ranks`.
"""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.runs import DESCRIPTION, FROZEN, column, edited, equal, error, first, rows_of, write_data
from helpers.shell import torchrun
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lit_gpt.train
from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.data.dataset import Dataset, heaviest_first, micro_batches, step_records
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.device import weight_dtype
from lit_gpt.distributed import launch
from lit_gpt.evaluation.forgetting_in_training import general_text_of
from lit_gpt.evaluation.validation_metric import validation_metric
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.make_optimizer import make_optimizer
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Segment
from lit_gpt.optimizer_in_backward import check_in_backward
from lit_gpt.runs.methods import METHODS
from lit_gpt.runs.resume import data_fingerprint
from lit_gpt.runs.saves import Checkpoints
from lit_gpt.train import TrainArgs, flags_for_more_steps, learning_rate

ROOT = Path(__file__).parents[1]
EVERYWHERE = LoRA(r=4, alpha=8, query=True, key=True, value=True, projection=True, mlp=True, head=True)
TRAIN = TrainArgs(learning_rate=5e-3, global_batch_size=8, micro_batch_size=4, epochs=2, max_steps=4, warmup_steps=2)
IN_BACKWARD = dataclasses.replace(TRAIN, micro_batch_size=8, optimizer_in_backward=True)
ONE_PASS = {"optimizer_in_backward": True, "micro_batch_size": 8}
STEPS = {"8x1": (8, 1), "2x4": (8, 4), "1x8": (8, 8), "5x1": (5, 1), "1x5": (5, 8)}  # passes -> records, size of one


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


def adapted(tiny_dir: Path, lora: LoRA = LoRA(), dtype: torch.dtype | None = None) -> GPT:
    """What finetune/lora.py trains."""
    torch.manual_seed(0)
    model = build_model(Config.from_checkpoint(tiny_dir))
    load_weights(model, tiny_dir, dtype)
    apply_lora(model, lora)
    mark_only_lora_as_trainable(model)
    return model


def run_fit(
    model: GPT,
    data_dir: Path,
    out_dir: Path,
    args: TrainArgs = TRAIN,
    resume: bool = False,
    precision: str = "32-true",
) -> list[dict]:
    """Trains on one process and returns the rows of metrics.csv, but for the clock's and the memory's columns."""
    train_data, val_data = Dataset(data_dir, "train"), Dataset(data_dir, "val")
    checkpoints = Checkpoints(out_dir, model, DESCRIPTION)
    tokenizer = Tokenizer(Path(train_data.meta["checkpoint"]))
    lit_gpt.train.fit(
        launch(1, precision),
        model,
        train_data,
        val_data,
        args,
        checkpoints,
        resume,
        metric=validation_metric(args, tokenizer, val_data),
        general_text=general_text_of(args, tokenizer, model.config, METHODS["lora"]),
    )
    return rows_of(out_dir)


# ---- exactness: one step's gradient is the same however it is computed


def exact_model(tiny_dir: Path) -> GPT:
    model = adapted(tiny_dir, EVERYWHERE).double()
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):  # zero, it would make the gradient of A zero too
            torch.nn.init.normal_(param, std=0.1)
    return model


def step_gradients(
    fabric: Any, tiny_dir: Path, train_data: Dataset, out_dir: Path, size: int, fit: Callable = lit_gpt.train.fit
) -> dict[str, torch.Tensor]:
    """What the loop hands to the optimizer in its first step, over all the records."""
    model, gradients = exact_model(tiny_dir), {}
    no_data = first(train_data, 0)
    handle = register_optimizer_step_pre_hook(
        lambda *_: gradients.update((n, p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad)
    )
    args = TrainArgs(global_batch_size=len(train_data), micro_batch_size=size, max_steps=1, max_norm=None)
    fit(fabric, model, train_data, no_data, args, Checkpoints(out_dir, model, DESCRIPTION))
    handle.remove()
    return gradients


def padded_gradients(tiny_dir: Path, train_data: Dataset) -> dict[str, torch.Tensor]:
    """The same by hand: one padded batch, all logits, no layout."""
    model = exact_model(tiny_dir)
    records = [train_data[i] for i in range(len(train_data))]
    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in records], batch_first=True)  # (B, T)
    trained = torch.nn.utils.rnn.pad_sequence([trained for _, trained in records], batch_first=True)
    logits = model(ids)[:, :-1]  # (B, T - 1, V)
    F.cross_entropy(logits[trained[:, 1:]], ids[:, 1:][trained[:, 1:]]).backward()
    return {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


@pytest.fixture(scope="module")
def expected(tiny_dir: Path, data_dir: Path) -> dict[int, dict[str, torch.Tensor]]:
    return {n: padded_gradients(tiny_dir, first(Dataset(data_dir, "train"), n)) for n in (5, 8)}


@pytest.mark.parametrize("name", STEPS)
def test_gradient_does_not_depend_on_micro_batches(name: str, tiny_dir, data_dir, tmp_path, expected) -> None:
    n, size = STEPS[name]
    data = first(Dataset(data_dir, "train"), n)
    assert len({data.length(i) for i in range(n)}) > 3, "records of different lengths"
    assert error(step_gradients(launch(1, "32-true"), tiny_dir, data, tmp_path, size), expected[n]) < 1e-10


@pytest.mark.parametrize("budget", [1, 60, 150, 10_000])
@pytest.mark.parametrize("share", [False, True])
def test_gradient_does_not_depend_on_the_token_budget(budget, share, tiny_dir, data_dir, tmp_path, expected) -> None:
    loop = edited(lit_gpt.train)
    loop.micro_batches = lambda *args, **of: micro_batches(
        *args, **of | dict(share_prefixes=share, micro_batch_tokens=budget)
    )
    data = first(Dataset(data_dir, "train"), 8)
    assert error(step_gradients(launch(1, "32-true"), tiny_dir, data, tmp_path, 8, loop.fit), expected[8]) < 1e-10


def test_wrong_divisor_fails_the_check(tiny_dir, data_dir, tmp_path, expected) -> None:
    fit = edited(lit_gpt.train, (")) / n_targets", ")) / layout.n_targets / len(batches)")).fit  # the mean of means
    wrong = step_gradients(launch(1, "32-true"), tiny_dir, first(Dataset(data_dir, "train"), 8), tmp_path, 4, fit)
    assert error(wrong, expected[8]) > 1e-3


def test_leaked_target_fails_the_check(tiny_dir, data_dir, tmp_path, expected) -> None:
    data = first(Dataset(data_dir, "train"), 8)
    data.trained = data.trained.copy()
    data.trained[data.ends[data.records[3]] - 1] = 0  # the loss of one token less
    assert error(step_gradients(launch(1, "32-true"), tiny_dir, data, tmp_path, 4), expected[8]) > 1e-3


def test_leaked_attention_fails_the_check(tiny_dir, data_dir, tmp_path, expected) -> None:
    loop = edited(lit_gpt.train)

    def one_segment(*args: Any, **of: Any) -> list:
        batches = micro_batches(*args, **of | dict(share_prefixes=False))
        return [(idx, dataclasses.replace(it, segments=(Segment(0, it.n_tokens),))) for idx, it in batches]

    loop.micro_batches = one_segment
    data = first(Dataset(data_dir, "train"), 8)
    assert error(step_gradients(launch(1, "32-true"), tiny_dir, data, tmp_path, 2, loop.fit), expected[8]) > 1e-3


# ---- two processes


def setup_dtypes(tiny_dir: Path, precision: str, devices: int) -> dict[str, torch.dtype]:
    """The dtype of every parameter and buffer as the loop has them before its first step."""
    fabric = launch(devices, precision)
    model = adapted(tiny_dir, EVERYWHERE, weight_dtype(precision))
    fabric.setup(model, make_optimizer(model, TRAIN))
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def one_of_two_ranks(tiny_dir: Path, data_dir: Path, out_dir: Path) -> None:
    fabric = launch(2, "32-true")
    gradients = {}
    halved = edited(lit_gpt.train, ("part * fabric.world_size", "part")).fit
    for name, n, size, fit in [(k, *v, lit_gpt.train.fit) for k, v in STEPS.items()] + [("halved", 8, 4, halved)]:
        data = first(Dataset(data_dir, "train"), n)
        gradients[name] = step_gradients(fabric, tiny_dir, data, out_dir / name, size, fit)
    dtypes = {precision: setup_dtypes(tiny_dir, precision, 2) for precision in FROZEN}
    with pytest.raises(InputError, match="optimizer_in_backward is for one device, and there are 2"):
        check_in_backward("torch.optim.AdamW", fabric)
    torch.save({"gradients": gradients, "dtypes": dtypes}, out_dir / f"{fabric.global_rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny_dir: Path, data_dir: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    out_dir = tmp_path_factory.mktemp("ranks")
    torchrun(__file__, tiny_dir, data_dir, out_dir)
    return [torch.load(out_dir / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", STEPS)
def test_gradient_does_not_depend_on_processes(name: str, two_ranks, expected) -> None:
    """With 5 records one at a time, the second rank's last pass is an empty one."""
    for rank in two_ranks:
        assert error(rank["gradients"][name], expected[STEPS[name][0]]) < 1e-10
        assert error(rank["gradients"]["halved"], expected[8]) > 1e-3


@pytest.mark.parametrize("precision", FROZEN)
def test_setup_keeps_every_dtype(precision: str, tiny_dir, two_ranks) -> None:
    for found in (setup_dtypes(tiny_dir, precision, 1), *(rank["dtypes"][precision] for rank in two_ranks)):
        ours = {name for name in found if "lora_" in name or name.endswith(".theta")}
        assert len(ours) == 2 * 15 + 1 and len(found) == len(ours) + 15 + 6, "A, B and theta; linears, norms, embedding"
        assert {found[name] for name in ours} == {torch.float32}
        assert {found[name] for name in found.keys() - ours} == {FROZEN[precision]}


# ---- which records, at which rate


@given(n=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_every_epoch_sees_every_record_once(n: int, size: int, seed: int) -> None:
    per_epoch = TrainArgs(global_batch_size=size).steps_per_epoch(n)
    epochs = [[step_records(n, epoch * per_epoch + i, size, seed) for i in range(per_epoch)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(n)) and all(len(step) == size for step in epoch[:-1])
    assert n < 10 or sum(epochs[0], []) != sum(epochs[1], []), "a new order each epoch"
    assert epochs[1][0] == step_records(n, per_epoch, size, seed), "a function of the step alone"
    assert n < 10 or size < 10 or epochs[0][0] != step_records(n, 0, size, seed + 1)


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=40),
    size=st.integers(1, 9),
    ranks=st.integers(1, 4),
    share=st.booleans(),
)
def test_micro_batches_lose_and_double_nothing(lengths: list[int], size: int, ranks: int, share: bool) -> None:
    data = Dataset.__new__(Dataset)  # a prepared folder in memory: every token is another one
    data.ends, data.records = np.cumsum(lengths), np.arange(len(lengths))
    data.tokens, data.trained = np.arange(1, data.ends[-1] + 1), np.arange(data.ends[-1]) % 3 > 0
    asked = list(range(len(lengths)))[::2]
    batches = [micro_batches(data, asked, size, rank, ranks, share) for rank in range(ranks)]
    assert len({len(of_rank) for of_rank in batches}) == 1, "unequal passes deadlock"
    records = [[data[i][0][1:] for i in asked], [data[i][0][1:][data[i][1][1:]] for i in asked]]
    everything, targets = (sorted(torch.cat(parts).tolist()) for parts in records)
    layouts = [layout for of_rank in batches for _, layout in of_rank]
    tokens = torch.cat([idx[0][layout.pos > 0] for of_rank in batches for idx, layout in of_rank])
    assert sorted(tokens.tolist()) == everything
    assert sorted(torch.cat([layout.target for layout in layouts]).tolist()) == targets
    assert all(len(layout.segments) <= size for layout in layouts)
    counts = [layout.n_tokens for layout in layouts]
    assert max(counts) - min(counts) <= max(lengths), "of similar length"


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=40),
    prefix=st.integers(0, 30),
    budget=st.integers(1, 200),
    ranks=st.integers(1, 4),
    share=st.booleans(),
)
def test_a_token_budget(lengths: list[int], prefix: int, budget: int, ranks: int, share: bool) -> None:
    """As many records as fit, like lengths together; only one that is too long by itself exceeds the budget."""
    data = Dataset.__new__(Dataset)
    lengths = [length + prefix for length in lengths]
    data.ends, data.records = np.cumsum(lengths), np.arange(len(lengths))
    data.tokens, data.trained = np.arange(1, data.ends[-1] + 1), np.ones(data.ends[-1], np.uint8)
    for end, length in zip(data.ends, lengths):
        data.tokens[end - length : end - length + prefix] = -np.arange(prefix) - 1
    batches = [micro_batches(data, range(len(lengths)), 1, rank, ranks, share, budget) for rank in range(ranks)]
    assert len({len(of_rank) for of_rank in batches}) == 1, "unequal passes deadlock"
    targets = torch.cat([layout.target for of_rank in batches for _, layout in of_rank])
    assert sorted(targets.tolist()) == sorted(t for i in range(len(lengths)) for t in data[i][0][1:].tolist())
    for of_rank in batches:
        own = [[s for s in layout.segments if s.prefix_length or not share or not prefix] for _, layout in of_rank]
        assert all(layout.n_tokens <= budget or len(own[i]) <= 1 for i, (_, layout) in enumerate(of_rank))
        longest = [max(layout.pos).item() for _, layout in of_rank if layout.n_targets]
        assert longest == sorted(longest, reverse=True), "like lengths together, the longest first"


def test_what_the_data_are_is_known(tiny_dir, tmp_path) -> None:
    """Any other content or marks, of prepared records or of some in memory, is another fingerprint."""
    texts = [f"{i} and {i}" for i in range(1000)]

    def of_folder(texts: list[str], **settings) -> str:
        records = [{"instruction": "Again", "output": text} for text in texts]
        settings |= dict(checkpoint_dir=tiny_dir, data_dir=tmp_path / "data", prompt_style="none", val_fraction=0.0)
        prepare(records, DataArgs(**settings))
        return data_fingerprint(Dataset(tmp_path / "data", "train"))

    def in_memory(tokens: list[int], trained: list[int]) -> str:
        data = Dataset.__new__(Dataset)
        data.meta, data.ends, data.records = {}, np.array([len(tokens)]), np.array([0])
        data.tokens, data.trained = np.array(tokens), np.array(trained, np.uint8)
        return data_fingerprint(data)

    edited = [text.replace("7", "8") if i == 777 else text for i, text in enumerate(texts)]
    assert of_folder(texts) == of_folder(texts)
    assert len({of_folder(texts), of_folder(edited), of_folder(texts, mask_prompt=False)}) == 3
    ids, marks = list(range(9000)), [1] * 9000
    assert in_memory(ids, marks) == in_memory(ids, marks)
    assert len({in_memory(ids, marks), in_memory([5, *ids[1:]], marks), in_memory(ids, [*marks[1:], 0])}) == 3


@given(
    lengths=st.lists(st.integers(1, 99), min_size=1, max_size=60),
    size=st.integers(1, 9) | st.just(10**25),  # all records in one step
    seed=st.integers(0, 9),
)
def test_the_heaviest_steps_come_first(lengths: list[int], size: int, seed: int) -> None:
    data = Dataset.__new__(Dataset)
    data.ends, data.records = np.cumsum(lengths), np.arange(len(lengths))
    order = heaviest_first(data, size, seed)
    assert sorted(order) == list(range(-(-len(lengths) // size)))
    steps = [[lengths[i] for i in step_records(len(lengths), step, size, seed)] for step in order]
    assert sum(steps[0]) == max(map(sum, steps)) and max(lengths) in map(max, steps[:2])
    rest = [step for step in order if step not in order[:2]]
    assert rest == sorted(rest)


@pytest.mark.parametrize("warmup, steps", [(0, 1), (10, 1), (0, 7), (1, 7), (3, 7), (7, 7), (10, 7), (3, 4)])
def test_learning_rate(warmup: int, steps: int) -> None:
    args = TrainArgs(learning_rate=0.5, min_learning_rate=0.1, warmup_steps=warmup, global_batch_size=10)
    assert dataclasses.replace(args, epochs=steps).steps(10) == steps
    assert dataclasses.replace(args, epochs=9, max_steps=steps).steps(25) == steps, "max_steps may end an epoch early"
    rates = [learning_rate(step, steps, args) for step in range(steps)]
    warmup = max(1, min(warmup, steps // 2))  # a short run warms up for half of it
    peak = warmup - 1
    assert rates[0] == pytest.approx(0.5 / warmup), "the first step learns"
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[peak] == max(rates) == pytest.approx(0.5)
    assert steps == 1 or rates[-1] == pytest.approx(0.1)


# ---- the loop's settings and its ends


def trace(tiny_dir: Path, data_dir: Path, out_dir: Path, args: TrainArgs) -> dict[str, Any]:
    """What a run leaves behind, and what it computed: the tokens of each pass."""
    model, passes = adapted(tiny_dir), []
    model.register_forward_pre_hook(lambda module, args: passes.append(args[0].size(1)) if module.training else None)
    with mock.patch.object(Checkpoints, "save_state", autospec=True, side_effect=Checkpoints.save_state) as saves:
        rows = run_fit(model, data_dir, out_dir, args)
    files = sorted(path.relative_to(out_dir).as_posix() for path in out_dir.rglob("*"))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    weights = {key: value.tolist() for key, value in load_file(out_dir / "last/lora.safetensors").items()}
    counts = {"passes": len(passes), "computed": sum(passes), "saves": saves.call_count}
    return columns | counts | {"weights": weights, "files": files}


BASE = dataclasses.replace(
    TRAIN, learning_rate=0.02, max_steps=6, micro_batch_size=16, keep_steps=True, save_interval=4
)
LEARNED = {"weights", "loss", "val_loss", "grad_norm"}
SCHEDULE = LEARNED | {"learning_rate"}
FORGETTING = {"general_loss", "general_kl"}
MEASURED = FORGETTING | {"metric", "scale"}  # columns that are empty unless asked for
LENGTH = SCHEDULE | MEASURED | {"step", "epoch", "tokens", "trained_tokens", "files", "passes", "computed"}
ANSWER_LENGTH = f"{ROOT}/tests/helpers/answer_length.py:judge"
FLIPS: dict[str, tuple[Any, set[str]]] = {  # field -> another value, and all that it changes
    "learning_rate": (0.01, SCHEDULE),
    "min_learning_rate": (0.01, SCHEDULE),
    "warmup_steps": (1, SCHEDULE),
    "weight_decay": (10.0, LEARNED),
    "beta1": (0.5, LEARNED),
    "beta2": (0.5, LEARNED),
    "max_norm": (None, LEARNED),
    "optimizer_in_backward": (True, {"passes", "computed"}),  # twice, since the gradient is clipped
    "global_batch_size": (16, LENGTH - MEASURED - {"step", "files", "passes", "learning_rate"}),
    "micro_batch_size": (4, {"passes", "computed"}),  # smaller batches have fewer prefixes to share
    "micro_batch_tokens": (60, {"passes", "computed"}),
    "share_prefixes": (False, {"computed"}),
    "epochs": (1, LENGTH),
    "max_steps": (5, LENGTH),
    "max_hours": (1e-9, LENGTH | {"saves"}),
    "eval_interval": (2, {"val_loss"}),
    "eval_records": (2, {"val_loss"}),
    "metric": (ANSWER_LENGTH, {"metric"}),
    "metric_records": (1, {"metric"}),
    "watch_forgetting": (True, FORGETTING),
    "general_text": (ROOT / "LICENSE", FORGETTING),
    "max_forgetting": (1e-3, LEARNED | FORGETTING | {"scale", "passes", "computed"}),
    "patience": (1, LENGTH - {"weights"} | {"saves"}),
    "save_minutes": (1e-9, {"saves"}),
    "save_interval": (3, {"files"}),
    "keep_steps": (False, {"files"}),
    "seed": (7, LEARNED | {"tokens", "trained_tokens", "computed"}),
}
BASES = {  # where a setting shows under another base only
    "metric_records": {"metric": ANSWER_LENGTH},
    "general_text": {"watch_forgetting": True},
    "max_forgetting": {"watch_forgetting": True},
    "patience": {"learning_rate": 1e-30, "eval_interval": 2},
    "max_norm": {"max_norm": 0.01},
}


@pytest.fixture(scope="module")
def trace_of(tmp_path_factory, tiny_dir, data_dir) -> Callable[[TrainArgs], dict[str, Any]]:
    return functools.cache(lambda args: trace(tiny_dir, data_dir, tmp_path_factory.mktemp("run"), args))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainArgs)])
def test_every_setting_changes_the_run(name: str, trace_of) -> None:
    value, expected = FLIPS[name]
    base = dataclasses.replace(BASE, **BASES.get(name, {}))
    assert getattr(base, name) != value
    before, after = trace_of(base), trace_of(dataclasses.replace(base, **{name: value}))
    assert {key for key in before if not close(before[key], after[key])} == expected


def close(a: Any, b: Any) -> bool:
    """Equal, up to the rounding of another order of summation."""
    if isinstance(a, dict | list) and isinstance(a, type(b)):
        pairs = zip(a.values(), b.values()) if isinstance(a, dict) else zip(a, b)
        return len(a) == len(b) and all(close(x, y) for x, y in pairs)
    return a == b if isinstance(a, str | None) or b is None else math.isclose(a, b, rel_tol=1e-5, abs_tol=2e-5)


def test_all_that_may_train_does_and_nothing_else(tiny_dir, data_dir, tmp_path) -> None:
    """With a validation before the first step."""
    model = adapted(tiny_dir, EVERYWHERE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = run_fit(model, data_dir, tmp_path, dataclasses.replace(TRAIN, max_steps=2))
    assert rows[0]["step"] == 0 and rows[0]["val_loss"] > 1
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name} and len(moved) == 2 * 15


@pytest.mark.parametrize(
    "rate, intervals, message, kept",
    [
        (1e30, {"save_interval": 3}, "loss of step 5 is nan", 3),
        (1e30, {"save_interval": 3, **ONE_PASS, "max_norm": None}, "loss of step 5 is nan", 3),
        (1e30, {"save_interval": 3, **ONE_PASS}, "loss of step 5 is nan", 3),
        (math.nan, {"save_interval": 2}, "trained weight after step 4 is nan", 2),
        (1e30, {"save_interval": 2, "eval_interval": 1}, "validation loss after step 4 is nan", 2),
    ],
)
def test_what_is_not_finite_stops_the_run(
    rate: float, intervals: dict, message: str, kept: int, tiny_dir, data_dir, tmp_path, monkeypatch
) -> None:
    """The fourth step breaks the weights. What was saved before is whole, and the run goes on from there."""
    args = dataclasses.replace(TRAIN, max_steps=6, keep_steps=True, **intervals)
    with monkeypatch.context() as patch:
        patch.setattr(lit_gpt.train, "learning_rate", lambda step, *_: rate if step == 3 else 0.01)
        with pytest.raises(InputError, match=message):
            run_fit(adapted(tiny_dir), data_dir, tmp_path, args)
    good = load_file(tmp_path / "last/lora.safetensors")
    assert equal(good, load_file(tmp_path / f"step-{kept:06d}/lora.safetensors"))
    assert all(tensor.isfinite().all() for tensor in good.values())
    assert all(t.isfinite().all() for t in load_file(tmp_path / "best/lora.safetensors").values())
    rows = run_fit(adapted(tiny_dir), data_dir, tmp_path, args, resume=True)
    assert [row["step"] for row in rows] == list(range(7)) and all(row["loss"] < 20 for row in rows[1:])


# ---- the optimizer in backward


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_the_optimizer_in_backward_trains_the_same_and_may_be_switched(max_norm, tiny_dir, data_dir, tmp_path) -> None:
    """To the bit: weights, the optimizer's state, losses and norms; with dropout, in one and in two sittings."""
    lora = dataclasses.replace(EVERYWHERE, dropout=0.3)
    args = dataclasses.replace(IN_BACKWARD, max_norm=max_norm)
    after = dataclasses.replace(args, optimizer_in_backward=False)
    expected = run_fit(adapted(tiny_dir, lora), data_dir, tmp_path / "after", after)
    assert run_fit(adapted(tiny_dir, lora), data_dir, tmp_path / "in", args) == expected
    assert max_norm is None or all(row["grad_norm"] > max_norm for row in expected[1:]), "each step is clipped"

    # one step with it, one without, the rest with it
    for number, sitting in enumerate((args, after, args)):
        stopped = dataclasses.replace(sitting, max_hours=1e-9 if number < 2 else None)
        run_fit(adapted(tiny_dir, lora), data_dir, tmp_path / "parts", stopped, resume=number > 0)
    assert column(tmp_path / "parts", "grad_norm") == column(tmp_path / "after", "grad_norm")
    for file in ("lora.safetensors", "state.safetensors"):
        states = [load_file(tmp_path / run / "last" / file) for run in ("after", "in", "parts")]
        assert equal(states[0], states[1]) and equal(states[0], states[2])


def test_gradients_are_never_held_together(tiny_dir, data_dir, tmp_path) -> None:
    """When the optimizer steps, one parameter has a gradient; afterwards none has, and none is stepped on any more."""
    model = adapted(tiny_dir, EVERYWHERE)
    trained = [param for param in model.parameters() if param.requires_grad]
    held = []
    handle = register_optimizer_step_pre_hook(lambda *_: held.append(sum(p.grad is not None for p in trained)))
    run_fit(model, data_dir, tmp_path, IN_BACKWARD)
    assert held == [1] * IN_BACKWARD.max_steps * len(trained)
    ids, _ = Dataset(data_dir, "train")[0]
    model(ids[None]).sum().backward()
    handle.remove()
    assert len(held) == IN_BACKWARD.max_steps * len(trained) and all(p.grad is not None for p in trained)


def test_several_micro_batches_are_refused_with_the_optimizer_in_backward(tiny_dir, data_dir, tmp_path) -> None:
    expected = "8 records in micro-batches of 4, expected one. Set --train.global_batch_size 4, or .*micro_batch_size 8"
    with pytest.raises(InputError, match=expected):
        dataclasses.replace(IN_BACKWARD, micro_batch_size=4)
    with pytest.raises(InputError, match="a micro-batch up to 100, expected one") as error:
        run_fit(adapted(tiny_dir), data_dir, tmp_path, dataclasses.replace(IN_BACKWARD, micro_batch_tokens=100))
    assert not list(tmp_path.iterdir()), "nothing has been written"
    (enough,) = re.findall(r"--train.micro_batch_tokens (\d+)", str(error.value))
    args = dataclasses.replace(IN_BACKWARD, micro_batch_tokens=int(enough))
    assert len(run_fit(adapted(tiny_dir), data_dir, tmp_path, args)) == 1 + TRAIN.max_steps


def test_a_step_whose_gradient_overflows_is_said(tiny_dir, data_dir, tmp_path, capfd) -> None:
    """In 16-mixed the factor of the loss begins at 2^16: here it has to come down to 2^14, in two steps."""
    model = adapted(tiny_dir, EVERYWHERE)
    weight = model.transformer.h[0].attn.q.lora_B
    before = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        before.append(weight.detach().clone())
        return gradient * math.inf if len(before) <= 2 else gradient

    weight.register_hook(overflow)
    args = dataclasses.replace(TRAIN, micro_batch_size=8, max_steps=4)
    run_fit(model, data_dir, tmp_path, args, precision="16-mixed")
    said = [line for line in capfd.readouterr().err.splitlines() if "changes no weight" in line]
    assert [line.split()[1] for line in said] == ["1", "2"]
    assert torch.equal(before[2], before[0]) and not torch.equal(before[3], before[2])


def test_a_gradient_that_always_overflows_stops_the_run(tiny_dir, data_dir, tmp_path) -> None:
    """Or the run would end as if all were well, with the weights that it began with."""
    model = adapted(tiny_dir, EVERYWHERE)
    model.lm_head.lora_B.register_hook(lambda gradient: gradient * math.inf)
    args = dataclasses.replace(TRAIN, global_batch_size=1, micro_batch_size=1, epochs=10, max_steps=40)
    with pytest.raises(InputError, match="The norm of the gradient in step 18, as in many before it, is .*--precision"):
        run_fit(model, data_dir, tmp_path, args, precision="16-mixed")


def test_patience(tiny_dir, data_dir, tmp_path) -> None:
    args = dataclasses.replace(TRAIN, learning_rate=1e-30, max_steps=6, eval_interval=1, patience=2)
    rows = run_fit(adapted(tiny_dir), data_dir, tmp_path, args)
    assert [row["step"] for row in rows] == [0, 1, 2]
    saved = (tmp_path / "last/state.safetensors").stat().st_mtime_ns
    assert run_fit(adapted(tiny_dir), data_dir, tmp_path, args, resume=True) == rows, "it is over, and stays so"
    assert (tmp_path / "last/state.safetensors").stat().st_mtime_ns == saved
    more = dataclasses.replace(args, patience=3)
    assert run_fit(adapted(tiny_dir), data_dir, tmp_path, more, resume=True)[:3] == rows
    assert len(rows_of(tmp_path)) == 4


def test_out_of_time_saves_and_can_go_on(tiny_dir, data_dir, tmp_path) -> None:
    rows = run_fit(adapted(tiny_dir), data_dir, tmp_path / "two", dataclasses.replace(TRAIN, max_hours=1e-9))
    assert [row["step"] for row in rows] == [0, 1] and rows[1]["val_loss"] is not None
    run_fit(adapted(tiny_dir), data_dir, tmp_path / "two", TRAIN, resume=True)
    run_fit(adapted(tiny_dir), data_dir, tmp_path / "one", TRAIN)
    assert column(tmp_path / "two", "loss") == column(tmp_path / "one", "loss")
    assert equal(*(load_file(tmp_path / name / "last/lora.safetensors") for name in ("one", "two")))


def test_stops_cost_no_patience(tiny_dir, data_dir, tmp_path) -> None:
    """Each stop validates once more. Neither a loss nor a gain of these moves the step after which patience ends."""
    for rate in (1e-30, 1.0):
        args = dataclasses.replace(TRAIN, learning_rate=rate, warmup_steps=0, max_steps=9, eval_interval=2, patience=2)
        whole, parts = tmp_path / f"whole-{rate}", tmp_path / f"parts-{rate}"
        run_fit(adapted(tiny_dir), data_dir, whole, args)
        for resume in (False, *8 * [True]):
            stopped = dataclasses.replace(args, max_hours=1e-9)
            run_fit(adapted(tiny_dir), data_dir, parts, stopped, resume=resume)
        assert column(whole, "loss") == column(parts, "loss")
        assert equal(*(load_file(folder / "last/lora.safetensors") for folder in (whole, parts)))


def test_about_ten_validations_by_default(tiny_dir, data_dir, tmp_path) -> None:
    args = TrainArgs()
    for steps, between in ((4, 5), (50, 5), (242, 25), (10_000, 1_000)):
        assert args.steps_between_evals(steps) == between
    assert dataclasses.replace(args, eval_interval=7).steps_between_evals(242) == 7
    rows = run_fit(adapted(tiny_dir), data_dir, tmp_path, dataclasses.replace(TRAIN, max_steps=6, eval_interval=None))
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [0, 5, 6]


@pytest.mark.parametrize(
    "n_records, settings, flags",
    [
        (57, {}, "--train.global_batch_size 4 --train.epochs 4"),
        (320, {}, "--train.epochs 3"),
        (57, {"global_batch_size": 4}, "--train.epochs 4"),
        (400, {}, ""),
        (57, {"max_steps": 3}, ""),  # as the user wants it
        (57, {"epochs": 7}, ""),
    ],
)
def test_too_few_steps_say_what_to_type(n_records: int, settings: dict, flags: str) -> None:
    assert flags_for_more_steps(n_records, TrainArgs(**settings)) == flags


def test_keep_steps(tiny_dir, data_dir, tmp_path) -> None:
    args = dataclasses.replace(TRAIN, max_steps=5, save_interval=2, keep_steps=True)
    run_fit(adapted(tiny_dir), data_dir, tmp_path, args)
    kept = [load_file(path / "lora.safetensors") for path in sorted(tmp_path.glob("step-*"))]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000002", "step-000004", "step-000005"]
    assert not equal(kept[0], kept[1]) and equal(kept[2], load_file(tmp_path / "last/lora.safetensors"))


@pytest.mark.parametrize("name", ["micro_batch_size", "epochs", "max_steps", "patience", "eval_records"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"train.{name} is 0"):
        TrainArgs(**{name: 0})


if __name__ == "__main__":
    one_of_two_ranks(*map(Path, sys.argv[1:]))
