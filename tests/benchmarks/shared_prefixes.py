"""What sharing prefixes saves: tokens computed per record, and records per second of LoRA, with and without it.

    python tests/benchmarks/shared_prefixes.py                 # on an otherwise idle machine

On the docstrings as scripts/prepare_docstrings.py prepares them, and with a system prompt of 300 tokens before each.
Both ways take turns on the same optimizer steps of 16 records, from the same weights; the losses must agree.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lit_gpt import Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.config import SAMPLE
from lit_gpt.data.dataset import Dataset, micro_batches, step_records
from lit_gpt.data.docstrings import records
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable


def system_prompt(tokenizer: Tokenizer, n_tokens: int) -> str:
    rules = (f"Rule {i}: answer in one paragraph, in plain words, and name what is returned." for i in range(1, 99))
    return tokenizer.decode(tokenizer.encode(" ".join(rules), bos=False)[:n_tokens])


def step(model: torch.nn.Module, data: Dataset, chosen: list[int], share: bool) -> tuple[float, int, float]:
    """(loss, tokens computed, seconds) of one optimizer step's forward and backward."""
    since = time.perf_counter()
    loss, tokens, targets = 0.0, 0, sum(data.n_targets(i) for i in chosen)
    for idx, layout in micro_batches(data, chosen, len(chosen), share_prefixes=share):
        part = model(idx, layout=layout) / targets
        part.backward()
        loss, tokens = loss + part.item(), tokens + layout.n_tokens
    return loss, tokens, time.perf_counter() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    tokenizer = Tokenizer(SAMPLE)
    model = load_model(SAMPLE, torch.float32)
    apply_lora(model, LoRA(r=8, alpha=16, key=False, projection=False, mlp=False))
    mark_only_lora_as_trainable(model)
    model.train()
    system = system_prompt(tokenizer, 300)
    with tempfile.TemporaryDirectory() as folder:
        for name, more in (("docstrings", {}), ("with a system prompt of 300 tokens", {"system": system})):
            data_dir = Path(folder) / name.split()[0]
            prepare((record | more for record in records()), DataArgs(data_dir=data_dir))
            data = Dataset(data_dir, "train")
            found: dict[bool, list[tuple[float, int, float]]] = {True: [], False: []}
            for i in range(args.steps + 1):  # the first one warms up
                for share in (True, False):
                    found[share].append(step(model, data, step_records(len(data), i, 16, 1337), share))
            apart, shared = (found[share][1:] for share in (False, True))
            assert all(abs(a - b) < 1e-5 * a for (a, *_), (b, *_) in zip(apart, shared)), "another loss"
            for label, rows in (("apart", apart), ("shared", shared)):
                tokens = sum(row[1] for row in rows) / 16 / args.steps
                speed = 16 / statistics.median(row[2] for row in rows)
                print(f"{name}, {label}: {tokens:.1f} tokens per record, {speed:.2f} records/s")


if __name__ == "__main__":
    main()
