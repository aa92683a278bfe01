"""The study behind the defaults of finetune/lora.py: which linears, and how fast.

    python tests/benchmarks/lora_defaults.py run          # hours; goes on where it was stopped
    python tests/benchmarks/lora_defaults.py table

Each cell is a run of finetune/lora.py on the docstrings: targets x learning rate x steps of 16 records x seed. After
it the loss of every validation record is written to a file. Seeds choose the records, their order and A; all cells of
a seed see the same records. The table compares cells over validation records: the loss of a record is the mean over
the seeds, and the intervals are bootstrapped over records, in pairs. The losses of the cells that have been run lie in
the folder lora_defaults/ beside this file.
"""

import argparse
import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import torch

from lit_gpt.config import SAMPLE
from lit_gpt.data.dataset import Dataset
from lit_gpt.display.tables import markdown_table
from lit_gpt.files import write_whole
from lit_gpt.lora import LoRA
from lit_gpt.model.packing import Layout
from lit_gpt.recipe import RunArgs
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.train import TrainArgs

DATA = Path("data/docstrings")
TARGETS = {
    "query, value": dict(key=False, projection=False, mlp=False),
    "all linears": dict(key=True, projection=True, mlp=True),
}
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
STEPS = (16, 32)  # 256 and 512 records, each seen once
SEEDS = (1, 2, 3)


def cells() -> list[tuple[str, float, int, int]]:
    """Every (targets, learning rate, steps, seed): the first seed of all cells first."""
    return [
        (targets, lr, steps, seed)
        for seed, steps, targets, lr in itertools.product(SEEDS, STEPS, TARGETS, LEARNING_RATES)
    ]


def losses_file(out_dir: Path, targets: str, lr: float, steps: int, seed: int) -> Path:
    return out_dir / f"{targets.replace(', ', '-').replace(' ', '-')}_{lr:g}_{steps}_{seed}.json"


def run(out_dir: Path, seeds: list[int]) -> None:
    """Trains every cell of these seeds that has no file of losses yet."""
    main = runpy.run_path("finetune/lora.py")["main"]
    for targets, lr, steps, seed in cells():
        file = losses_file(out_dir, targets, lr, steps, seed)
        if file.is_file() or seed not in seeds:
            continue
        print(f"\n{file.stem}", flush=True)
        main(
            RunArgs(
                checkpoint_dir=SAMPLE,
                data_dir=DATA,
                out_dir=Path(f"out/study-{seed}"),
                overwrite=True,
                n_answers=0,
                seed=seed,
            ),
            lora=LoRA(r=8, alpha=16, query=True, value=True, **TARGETS[targets]),
            train=TrainArgs(
                learning_rate=lr,
                warmup_steps=10,
                global_batch_size=16,
                max_steps=steps,
                eval_interval=steps,
                eval_records=1,  # the whole split is measured below
                seed=seed,
            ),
        )
        losses = record_losses(Path(f"out/study-{seed}/last"))
        write_whole(file, json.dumps(losses, separators=(",", ":")) + "\n")


@torch.no_grad()
def record_losses(finetuned: Path | None) -> list[list[float]]:
    """(summed loss, trained tokens) of every validation record."""
    model, _ = load_finetuned(None, finetuned)
    data = Dataset(DATA, "val")
    losses = []
    for i in range(len(data)):
        idx, layout = Layout.end_to_end([data[i]])
        losses.append([round(model(idx, layout=layout).item(), 4), layout.n_targets])
    return losses


# ---- the table


def table(out_dir: Path) -> None:
    """Prints the mean loss of each cell, and by how much it is above the best one of its size.

    A seed counts once all cells of a size have it: cells are compared on the same records.
    """
    combinations = list(itertools.product(TARGETS, LEARNING_RATES))
    for steps in STEPS:
        per_seed = [[losses_file(out_dir, *cell, steps, seed) for cell in combinations] for seed in SEEDS]
        complete = [files for files in per_seed if all(file.is_file() for file in files)]
        if not complete:
            continue
        per_cell = {}
        for cell, files in zip(combinations, zip(*complete)):
            per_cell[cell] = np.array([json.loads(file.read_text()) for file in files])  # (seeds, n, 2)
        best = min(per_cell, key=lambda cell: mean_loss(per_cell[cell]))
        print(f"\n{steps * 16} records, {steps} steps, {len(complete)} seeds; best: {best[0]}, {best[1]:g}\n")
        rows = []
        for targets in TARGETS:
            row = [targets]
            for lr in LEARNING_RATES:
                row.append(describe(per_cell[targets, lr], per_cell[best]))
            rows.append(row)
        heads = ["adapted", *(f"{lr:g}" for lr in LEARNING_RATES)]
        print(markdown_table(heads, rows, right=range(1, len(heads))))


def mean_loss(losses: np.ndarray) -> float:
    """The mean loss per token of (seeds, records, 2)."""
    return losses[..., 0].sum() / losses[..., 1].sum()


def describe(losses: np.ndarray, best: np.ndarray) -> str:
    """The loss of a cell, and its paired difference from the best one with a 95 % interval."""
    text = f"{mean_loss(losses):.4f}"
    if losses is best:
        return text
    difference = (losses[..., 0] - best[..., 0]).mean(0)  # of each record, over the seeds
    tokens = best[0, :, 1]
    chosen = np.random.default_rng(1).integers(len(tokens), size=(10_000, len(tokens)))
    resampled = difference[chosen].sum(1) / tokens[chosen].sum(1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return f"{text} (+{difference.sum() / tokens.sum():.4f}: {low:.4f} to {high:.4f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("act", choices=["run", "table"])
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="to share the cells among processes")
    arguments = parser.parse_args()
    if arguments.act == "run":
        run(arguments.out_dir, arguments.seeds)
    else:
        table(arguments.out_dir)
