"""What each method costs and gives, on your model and data.

    python scripts/compare_methods.py
    python scripts/compare_methods.py --minutes 5 --methods '["full", "LoRA, r 8"]'
    python scripts/compare_methods.py --steps 100 --flags '[--precision, bf16-true]'

Interrupted, the same command goes on.
"""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from lit_gpt import InputError
from lit_gpt.cli import run
from lit_gpt.compare import METHODS, Budget, compare, figure, seconds_per_step, settle, write_budget
from lit_gpt.config import SAMPLE
from lit_gpt.log import read_metrics

SCRIPTS = Path(__file__).parents[1] / "finetune"


def main(
    checkpoint_dir: Path = SAMPLE,
    data_dir: Path = Path("data/docstrings"),
    out_dir: Path = Path("out/compare"),
    methods: list[str] | None = None,
    minutes: float = 30,
    steps: int | None = None,
    general_text: Path | None = None,
    flags: list[str] | None = None,
) -> None:
    """Train with each method on the same records, and compare what it cost and gave.

    Args:
        checkpoint_dir: The base model.
        data_dir: What one of scripts/prepare_*.py wrote.
        out_dir: Where the runs, compare.md and compare.png go.
        methods: Which ones of those that lit_gpt/compare.py names. None is all.
        minutes: For all together, about. The steps that fit are found by a few of full fine-tuning.
        steps: Optimizer steps of 16 records for each method, instead.
        general_text: A text that has nothing to do with the data, on which forgetting is measured. None is
            lit_gpt/general.txt.
        flags: More flags for the scripts in finetune/.
    """
    methods = [*METHODS] if methods is None else methods
    if unknown := [name for name in methods if name not in METHODS]:
        raise InputError(f"No method is called {unknown[0]!r}. Known are: {'; '.join(METHODS)}.")
    text = (general_text or files("lit_gpt") / "general.txt").read_text(encoding="utf-8")
    budget = settle(Budget(str(checkpoint_dir), str(data_dir), steps or 0, flags or []), out_dir)
    if not budget.steps:
        each = seconds_per_step(SCRIPTS, replace(budget, steps=4), out_dir)
        budget = replace(budget, steps=max(1, round(minutes * 60 / len(methods) / each)))
    write_budget(budget, out_dir)
    outcomes = compare(methods, SCRIPTS, budget, text, out_dir)

    first = read_metrics(next(out_dir.glob("*/metrics.csv")))[0]["val_loss"]
    figure(outcomes, first).savefig(out_dir / "compare.png")
    print(f"{(out_dir / 'compare.md').read_text(encoding='utf-8')}\nPlot: {out_dir / 'compare.png'}")


if __name__ == "__main__":
    run(main)
