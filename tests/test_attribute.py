"""Which training records did what: `pytest tests/test_attribute.py`, about 15 s"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.methods import finetune
from helpers.models import make_record, small_gpt
from helpers.runs import write_data
from helpers.scripts import script
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lit_gpt import GPT, InputError, Tokenizer
from lit_gpt.attribution import influence, store
from lit_gpt.attribution.fit import other_questions
from lit_gpt.attribution.gradients import Record, RecordGradients, Sketch, first_target
from lit_gpt.checkpoint.weight_files import read_metadata
from lit_gpt.data.dataset import Dataset
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.model.packing import Layout
from lit_gpt.runs.load_finetuned import load_finetuned


def model_with_lora(**changes) -> GPT:
    """A float64 model with LoRA everywhere, B as after many steps."""
    model = small_gpt(**changes)
    apply_lora(model, LoRA(r=3, head=False))
    model.double()
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(param, std=0.3)
    return model


def records() -> list[Record]:
    """Prompts that begin alike, one that is all that they have in common, one with two answers, and a text."""
    torch.manual_seed(1)
    start = (1, 2, 3, 4)
    several = [make_record(9 + 4 * i, 3 + i, start) for i in range(4)]
    only_start = make_record(9, 5, start)
    ids, trained = make_record(20, 4, start)
    trained[8:11] = True
    return [*several, only_start, (ids, trained), (torch.randint(0, 50, (7,)), torch.ones(7, dtype=torch.bool))]


def gradient_alone(model: GPT, record: Record) -> tuple[torch.Tensor, float]:
    """The gradient of one record's loss, by autograd, all factors end to end; its prompt's keys and values are held."""
    n_prompt = first_target(record[1]) - 1

    def hold(linear: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.cat((output[:, :n_prompt].detach(), output[:, n_prompt:]), dim=1)

    mark_only_lora_as_trainable(model)
    model.zero_grad()
    handles = [m.register_forward_hook(hold) for block in model.transformer.h for m in (block.attn.k, block.attn.v)]
    idx, layout = Layout.end_to_end([record])
    loss = model(idx, layout=layout)
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = [param.grad.flatten() for name, param in model.named_parameters() if "lora_" in name]
    return torch.cat(gradients), loss.item()


def without_signs(sketch: Sketch, vector: torch.Tensor) -> torch.Tensor:
    """The vector that was sketched, if the sketch has room for all of its numbers."""
    signs = torch.cat(list(sketch.signs.values()))
    return vector[: len(signs)] * signs


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}], ids=["plain", "window"])
def test_gradients_of_a_micro_batch_are_those_of_its_records_alone(changes) -> None:
    model = model_with_lora(**changes)
    sketch = Sketch(size=50_000)
    source = RecordGradients(model, sketch)
    sketches, losses = source.of(records())
    for i, record in enumerate(records()):
        expected, loss = gradient_alone(model, record)
        difference = without_signs(sketch, sketches[i]) - expected
        assert difference.abs().max() < 1e-10 * expected.abs().max()
        assert losses[i].item() == pytest.approx(loss, rel=1e-10)


def test_who_else_is_in_the_micro_batch_changes_nothing() -> None:
    source = RecordGradients(model_with_lora(), Sketch(size=256))
    together, _ = source.of(records())
    for i, record in enumerate(records()):
        alone, _ = source.of([record])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-10)


def test_products_of_sketches_are_those_of_the_vectors() -> None:
    """Within five standard deviations; and without bias, over many seeds."""
    torch.manual_seed(0)
    u, v = torch.randn(2, 10_007, dtype=torch.float64)
    v += 0.3 * u
    vectors = torch.stack((u, v))

    def product(seed: int, size: int) -> float:
        sketch = Sketch(size, seed)
        sketches = torch.zeros(2, size, dtype=torch.float64)
        sketch.add(sketches, "first", vectors[:, :4000], 0)
        sketch.add(sketches, "second", vectors[:, 4000:], 4000)
        return float(sketches[0] @ sketches[1])

    deviation = float(u.norm() * v.norm()) / 1000**0.5
    errors = torch.tensor([product(seed, 1000) - float(u @ v) for seed in range(100)])
    assert errors.abs().max() < 5 * deviation
    assert errors.mean().abs() < 5 * deviation / 10
    assert errors.std() > deviation / 2  # a sketch that kept everything would prove nothing


@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        (lambda model: None, "carries LoRA"),
        (lambda model: apply_lora(model, LoRA(dora=True)), "dora"),
    ],
)
def test_a_model_whose_gradients_are_not_known(prepare: Callable[[GPT], None], what: str) -> None:
    model = small_gpt()
    prepare(model)
    with pytest.raises(InputError, match=what):
        RecordGradients(model, Sketch(16))


# ---- from gradients to influences


@pytest.mark.parametrize("n", [7, 60], ids=["fewer than numbers of a sketch", "more"])
def test_influences_by_their_definition(n: int, monkeypatch) -> None:
    monkeypatch.setattr(influence, "ROWS", 16)  # read in parts
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(n, 20)).astype(np.float32)
    targets = rng.normal(size=(3, 20)).astype(np.float32)
    H = sum(np.outer(g, g) for g in gradients.astype(np.float64))
    H += 0.5 * np.mean([g @ g for g in gradients]) * np.eye(20)
    expected = [[t @ np.linalg.inv(H) @ g for g in gradients] for t in targets]
    np.testing.assert_allclose(influence.influences(gradients, targets, damping=0.5), expected, rtol=1e-4, atol=1e-7)


def test_records_that_do_the_same(monkeypatch) -> None:
    monkeypatch.setattr(influence, "ROWS", 16)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(40, 30)).astype(np.float32)
    gradients[35] = 3 * gradients[2]
    gradients[20] = -gradients[1]  # the opposite is not the same
    (pair,) = influence.alike(gradients, least=0.9, most=10)
    assert (pair.first, pair.second) == (2, 35) and pair.cosine == pytest.approx(1, abs=1e-5)


# ---- the script


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_dir) -> Path:
    """A run with LoRA on a tiny model, its data, and what the script found of it."""
    folder = tmp_path_factory.mktemp("run")
    write_data(folder / "data", tiny_dir)
    finetune("lora", tiny_dir, folder / "data", folder / "lora")
    attribute(folder, folder / "found", select=0.2, drop=0.1)
    return folder


def attribute(run_dir: Path, out_dir: Path, **flags: Any) -> dict[str, Any]:
    """What the script reports."""
    settings = dict(finetuned=run_dir / "lora", out_dir=out_dir, precision="32-true") | flags
    script("scripts/attribute.py").main(**settings)
    return json.loads((out_dir / "report.json").read_text())


def table(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_asked_about_a_training_record_it_names_that_record(run_dir, tmp_path) -> None:
    shutil.copytree(run_dir / "found/gradients", tmp_path / "out/gradients")
    data = Dataset(run_dir / "data", "train")
    of_data = table(run_dir / "found")
    assert [int(row["record"]) for row in of_data] == data.records.tolist()
    for number in (3, 17):
        asked = of_data[number]
        report = attribute(run_dir, tmp_path / "out", prompt=asked["prompt"], answer=asked["answer"])
        assert report["lowered"][0]["record"] == int(data.records[number])
        assert report["loss"] == pytest.approx(float(asked["loss"]), rel=1e-4)


@torch.no_grad()
def test_misfits_by_hand(run_dir, tiny_dir) -> None:
    """The loss of an answer behind its own question, as a share of its mean loss behind nothing and another one."""
    model, _ = load_finetuned(None, run_dir / "lora", torch.float32)
    tokenizer = Tokenizer(tiny_dir)
    data = Dataset(run_dir / "data", "train")
    nothing, other = other_questions(data, tokenizer, 2)
    assert tokenizer.decode_with_special(nothing.tolist()).endswith(
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )

    def loss(question: torch.Tensor, answer: torch.Tensor) -> float:
        ids = torch.cat((question, answer))
        logits = model(ids[None])[0, len(question) - 1 : -1]
        return F.cross_entropy(logits, answer, reduction="sum").item()

    for number, row in list(enumerate(table(run_dir / "found")))[:6]:
        question, answer = data.question(number)
        elsewhere = (loss(nothing, answer) + loss(other, answer)) / 2
        assert float(row["misfit"]) == pytest.approx(loss(question, answer) / elsewhere, rel=1e-4)


def test_gradients_are_made_once(run_dir, tmp_path, monkeypatch) -> None:
    """Asked again it makes those of the target alone; interrupted, those that are missing; of other weights, all."""
    made: list[int] = []
    of = RecordGradients.of

    def counting(source: RecordGradients, records: list) -> tuple:
        if len(made) == 2 and stops:
            raise KeyboardInterrupt
        made.append(len(records))
        return of(source, records)

    monkeypatch.setattr(RecordGradients, "of", counting)
    monkeypatch.setattr(store, "SAVE_EVERY", 1)
    stops = True
    with pytest.raises(KeyboardInterrupt):
        attribute(run_dir, tmp_path / "out")
    assert made == [16, 16]
    stops = False
    attribute(run_dir, tmp_path / "out")
    assert made == [16, 16, 8, 7]
    expected = (run_dir / "found/gradients/gradients.bin").read_bytes()
    assert (tmp_path / "out/gradients/gradients.bin").read_bytes() == expected
    other = tmp_path / "other"
    shutil.copytree(run_dir / "lora/best", other)
    file = other / "lora.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file, read_metadata(file))
    attribute(run_dir, tmp_path / "out", finetuned=other, data_dir=run_dir / "data")
    assert made[4:] == [16, 16, 8, 7]


def test_data_of_the_helpful_and_without_the_suspicious(run_dir, tmp_path, tiny_dir) -> None:
    data = Dataset(run_dir / "data", "train")

    def in_order(column: str) -> list[int]:
        value_of = {int(row["record"]): float(row[column]) for row in table(run_dir / "found")}
        return sorted(value_of, key=value_of.__getitem__)

    helpful = Dataset(run_dir / "found/selected", "train")
    assert set(helpful.records.tolist()) == set(in_order("influence")[-8:])
    rest = Dataset(run_dir / "found/rest", "train")
    assert set(rest.records.tolist()) == set(in_order("misfit")[:-4])
    shutil.copytree(run_dir / "found/gradients", tmp_path / "out/gradients")
    attribute(run_dir, tmp_path / "out", drop=0.1, drop_by="influence", n_questions=0)
    rest = Dataset(tmp_path / "out/rest", "train")
    assert set(rest.records.tolist()) == set(in_order("influence")[4:])
    val = Dataset(run_dir / "found/selected", "val")
    assert val.records.tolist() == Dataset(run_dir / "data", "val").records.tolist()
    torch.testing.assert_close(helpful[0], data[int(np.flatnonzero(data.records == helpful.records[0])[0])])
    finetune("lora", tiny_dir, run_dir / "found/selected", tmp_path / "again")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"answer": "Ada."}, "Name a --prompt"),
        ({"drop": 0.1, "n_questions": 0}, "--n_questions is 0"),
        ({"select": 0.2}, "selected is not empty"),
        ({"out_dir": "lora"}, "holds no attribution"),
        ({"data_dir": "nowhere"}, "is not there"),
    ],
)
def test_what_cannot_be_asked(run_dir, tmp_path, flags: dict[str, Any], what: str) -> None:
    before = content(run_dir / "found")
    flags = {flag: run_dir / value if flag.endswith("dir") else value for flag, value in flags.items()}
    with pytest.raises(InputError, match=what):
        attribute(run_dir, **{"out_dir": run_dir / "found"} | flags)
    assert content(run_dir / "found") == before


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
