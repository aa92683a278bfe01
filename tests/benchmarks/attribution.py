"""Does scripts/attribute.py name the right records? Planted errors are to be found, and runs are made without some.

    python tests/benchmarks/attribution.py docstrings       about 25 min of a core, most of it for five trainings
    python tests/benchmarks/attribution.py labels           15 min; e-mails of scripts/download_spam.py

3 % of some hundred records get a wrong answer: in `docstrings` answers change places, in `labels` spam is called ham
and ham spam. A LoRA is trained on all of them, and then without those that were named, or as many random ones. All runs
see the other records in the same order. What has been done lies in out/attribution/, and the command goes on.
"""

import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lit_gpt.attribution.fit import behind
from lit_gpt.attribution.gradients import Record, RecordGradients, Sketch, first_target
from lit_gpt.attribution.influence import influences
from lit_gpt.checkpoint.load import load_model
from lit_gpt.config import SAMPLE
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.dataset import Dataset, step_records
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.prompts import render
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.evaluation.measure import n_targets
from lit_gpt.evaluation.record_losses import judge_records
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Layout

OUT = Path("out/attribution")
SKETCH_SIZE = 16384
LONGEST = 64  # tokens of a docstring's record


class Task(NamedTuple):
    """Records, of which some have wrong answers, and how to train on them."""

    train: list[Record]
    val: list[Record]
    planted: np.ndarray
    epochs: int
    batch_size: int
    learning_rate: float
    warmup_steps: int


def docstrings() -> Task:
    """400 short docstrings, of which the answers of 12 have changed places."""
    chance = np.random.default_rng(0)
    data = Dataset(Path("data/docstrings"), "train")
    val_data = Dataset(Path("data/docstrings"), "val")
    chosen = np.sort(chance.permutation(np.flatnonzero(data.lengths() <= LONGEST))[:400])
    train = [data[int(i)] for i in chosen]
    val = [val_data[i] for i in range(len(val_data)) if val_data.length(i) <= LONGEST][:96]
    planted = np.sort(chance.permutation(400)[:12])
    before = [train[i] for i in planted]
    for place, i in enumerate(planted):
        ids, trained = train[i]
        train[i] = behind(ids[: first_target(trained)], before[(place - 7) % 12])
    return Task(train, val, planted, epochs=2, batch_size=16, learning_rate=2e-3, warmup_steps=10)


def labels() -> Task:
    """The beginnings of 320 e-mails with the answer spam or ham, of which 10 are wrong."""
    folder = OUT / "labels-data"
    if not folder.exists():
        with Path("data/spam.csv").open(newline="") as file:
            mails = list(csv.DictReader(file))
        tokenizer = Tokenizer(SAMPLE)
        records = []
        for place, i in enumerate(np.random.default_rng(3).permutation(len(mails))[:416]):
            ids = tokenizer.encode(" ".join(mails[i]["text"].split()))[:36]
            question = f"Is this e-mail spam or ham? {tokenizer.decode(ids).strip()}"
            split = "train" if place < 320 else "val"
            records.append({"instruction": question, "output": mails[i]["label"], "split": split})
        prepare(records, DataArgs(checkpoint_dir=SAMPLE, data_dir=folder))
    data = Dataset(folder, "train")
    val_data = Dataset(folder, "val")
    train = [data[i] for i in range(len(data))]
    planted = np.sort(np.random.default_rng(11).permutation(320)[:10])
    example_of = {tuple(ids[first_target(trained) :].tolist()): (ids, trained) for ids, trained in train}
    for i in planted:
        ids, trained = train[i]
        first = first_target(trained)
        (other,) = example_of.keys() - {tuple(ids[first:].tolist())}
        train[i] = behind(ids[:first], example_of[other])
    val = [val_data[i] for i in range(len(val_data))]
    return Task(train, val, planted, epochs=1, batch_size=8, learning_rate=1e-3, warmup_steps=5)


TASKS: dict[str, Callable[[], Task]] = {"docstrings": docstrings, "labels": labels}


# ---- runs


def trained_model(task: Task, left_out: Collection[int] = ()) -> tuple[GPT, float]:
    """A model with LoRA that was trained without some records, and the CPU seconds of an epoch."""
    torch.manual_seed(1337)
    model = load_model(SAMPLE, torch.float32)
    apply_lora(model, LoRA())
    mark_only_lora_as_trainable(model)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    n = len(task.train)
    steps = task.epochs * math.ceil(n / task.batch_size)
    began = time.process_time()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * (step - task.warmup_steps) / (steps - task.warmup_steps)))
        factor = min(1.0, (step + 1) / task.warmup_steps) if step < task.warmup_steps else decay
        for group in optimizer.param_groups:
            group["lr"] = factor * task.learning_rate
        numbers = [i for i in step_records(n, step, task.batch_size, 1337) if i not in left_out]
        idx, layout = Layout.end_to_end([task.train[i] for i in numbers], share_prefixes=True)
        (model(idx, layout=layout) / layout.n_targets).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, (time.process_time() - began) / task.epochs


def mean_loss(model: GPT, records: list[Record]) -> float:
    losses = torch.cat(judge_records(model, records))
    return losses.double().mean().item()


def gradients(model: GPT, records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    source = RecordGradients(model, Sketch(SKETCH_SIZE))
    parts = [source.of(records[start : start + 16]) for start in range(0, len(records), 16)]
    return torch.cat([part[0] for part in parts]).numpy(), torch.cat([part[1] for part in parts]).numpy()


def scores(model: GPT, task: Task) -> dict[str, np.ndarray]:
    """Higher is more suspicious, but for the influence; and the CPU seconds that each took."""
    n = len(task.train)
    began = time.process_time()
    of_train, losses = gradients(model, task.train)
    gradient_seconds = time.process_time() - began
    of_val, _ = gradients(model, task.val)
    target = of_val.sum(0) / sum(map(n_targets, task.val))

    began = time.process_time()
    nothing = encode_question(render("chat", {"instruction": ""}, Tokenizer(SAMPLE)), Tokenizer(SAMPLE))
    ids, trained = task.train[np.random.default_rng(0).permutation(n)[0]]
    elsewhere = []
    for question in (nothing, ids[: first_target(trained)]):
        of_answers = judge_records(model, [behind(question, record) for record in task.train])
        elsewhere.append([values.sum().item() for values in of_answers])
    misfit_seconds = time.process_time() - began
    return {
        "influence": influences(of_train, target[None])[0],
        "loss": losses / np.array([n_targets(record) for record in task.train]),
        "misfit": losses / np.mean(elsewhere, axis=0),
        "seconds": np.array([gradient_seconds, misfit_seconds]),
    }


# ---- the study


def study(name: str) -> None:
    task = TASKS[name]()
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    n, k = len(task.train), len(task.planted)

    def outcome(run: str, left_out: Collection[int] = ()) -> dict:
        """The loss of a run on the validation records; the first one's model gives the scores."""
        file = folder / f"{run}.json"
        if not file.is_file():
            model, seconds = trained_model(task, left_out)
            found = {"val": mean_loss(model, task.val), "epoch_seconds": seconds}
            if run == "all":
                found |= {key: values.tolist() for key, values in scores(model, task).items()}
            file.write_text(json.dumps(found) + "\n")
        return json.loads(file.read_text())

    every = outcome("all")
    orders = {
        "loss": np.argsort(-np.array(every["loss"])),
        "misfit": np.argsort(-np.array(every["misfit"])),
        "harmful": np.argsort(every["influence"]),
    }
    for key, order in orders.items():
        found = [len(set(order[: times * k].tolist()) & set(task.planted.tolist())) for times in (1, 2)]
        print(f"{key}: {found[0]} of {k} planted errors among the first {k} of {n}, {found[1]} among the first {2 * k}")
    for what, seconds in zip(("gradients", "misfit"), every["seconds"]):
        print(f"{what}: {seconds / every['epoch_seconds']:.2f} of an epoch")

    chance = np.random.default_rng(1000).permutation(n)[:k]
    helpful = orders["harmful"][::-1]
    without = {"random": chance, "misfit": orders["misfit"][:k], "helpful": helpful[:k], "planted": task.planted}
    for run, left_out in without.items():
        change = outcome(f"without-{run}", set(left_out.tolist()))["val"] - every["val"]
        print(f"without {k} records, {run}: the loss changes by {change:+.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    study(parser.parse_args().task)
