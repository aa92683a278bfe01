"""How far `plan_memory.py --fit --probe` is from the fastest cell of a grid: real steps of the sample model on a CPU.

    python tests/benchmarks/fit_grid.py                         # half an hour on two quiet cores
    python tests/benchmarks/fit_grid.py --tokens 512,1024 --recompute none,block --caps 0.7 --steps 1

Every cell, micro-batch tokens by recomputation, trains a few optimizer steps of LoRA on the docstrings in float32, and
the median of their times counts. Under each cap of memory, a share of what the largest cell takes, the cell that --fit
chooses is compared with the fastest one that is planned to fit. On a machine that does anything else the figures are
noise.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from lit_gpt import GPT, Config
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.config import SAMPLE
from lit_gpt.device import default_device
from lit_gpt.display.tables import markdown_table
from lit_gpt.lora import LoRA
from lit_gpt.make_optimizer import TRIAL_SETTINGS, make_optimizer
from lit_gpt.memory.fit import Search, Wish, bytes_needed, filled, groups_of, lengths_of_step
from lit_gpt.memory.plan import Setup, adapt, batch_of
from lit_gpt.memory.probe import probe
from lit_gpt.memory.profile import profile_of
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt.train import TrainArgs


def seconds_of(setup: Setup, lengths: tuple[int, ...], limit: int, n_steps: int) -> float:
    """The median time of an optimizer step, after one that is not counted."""
    model: GPT = build_model(setup.config)
    load_weights(model, SAMPLE, setup.dtype, default_device())
    model = adapt(model, setup)
    optimizer = make_optimizer(model, TRIAL_SETTINGS)
    batches = [batch_of(group) for group in groups_of(lengths, limit)]
    times = []
    for _ in range(n_steps + 1):
        began = time.perf_counter()
        for idx, layout in batches:
            model(idx, layout=layout).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="400,800,1600,3200", help="of a micro-batch")
    parser.add_argument(
        "--recompute", default="none,selective,10,20,block", help="values of --activation_checkpointing"
    )
    parser.add_argument("--caps", default="0.3,0.5,0.7,1.0", help="shares of what the largest cell takes")
    parser.add_argument("--records", type=int, default=32, help="of a step")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    config = Config.from_checkpoint(SAMPLE)
    lengths = lengths_of_step(Path("data/docstrings"), TrainArgs(global_batch_size=args.records), 1)
    base = Setup(config, settings=LoRA(), dtype=torch.float32, lengths=lengths)
    speed = probe(base)
    print(f"{len(lengths)} records, {sum(lengths):,} tokens a step; {speed}\n")

    # every cell: the memory that is planned, and the time that is measured
    cells: dict[tuple[int, ActivationCheckpointing], tuple[float, float]] = {}
    for tokens in map(int, args.tokens.split(",")):
        for word in args.recompute.split(","):
            how: ActivationCheckpointing = int(word) if word.isdigit() else word  # type: ignore[assignment]
            limit = max(tokens, max(lengths))
            groups = groups_of(lengths, limit)
            batch = filled(max(groups, key=sum), min(limit, sum(lengths)), max(lengths))
            setup = replace(base, activation_checkpointing=how, lengths=batch, accumulates=len(groups) > 1)
            _, profile = profile_of(setup, speed)
            cells[limit, how] = (bytes_needed(profile), seconds_of(setup, lengths, limit, args.steps))
            print(f"{limit:6} {how!s:10} {cells[limit, how][0] / 1e9:.2f} GB {cells[limit, how][1]:.2f} s", flush=True)

    # what --fit chooses under each cap
    rows = []
    largest = max(needed for needed, _ in cells.values())
    for share in map(float, args.caps.split(",")):
        usable = share * largest
        wish = Wish(base, lengths, usable, speed, compiled=False, fixed=frozenset({"quantize", "optimizer"}))
        choice, _ = Search(wish).best()
        chosen = seconds_of(choice.setup, lengths, choice.tokens, args.steps)
        fitting = [seconds for needed, seconds in cells.values() if needed <= usable]
        best = min(fitting) if fitting else float("nan")
        what = f"{choice.tokens} {choice.setup.activation_checkpointing}"
        rows.append((f"{usable / 1e9:.2f}", what, f"{choice.seconds:.2f}", f"{chosen:.2f}", f"{best:.2f}"))
        rows[-1] += (f"{chosen / best - 1:+.1%}",)
    heads = ("usable GB", "chosen", "predicted s", "measured s", "best of the grid, s", "off by")
    print("", markdown_table(heads, rows, right=(0, 2, 3, 4, 5)), sep="\n")


if __name__ == "__main__":
    main()
