"""What each method costs and gives, on your model and data.

    python scripts/compare_methods.py
    python scripts/compare_methods.py --minutes 5 --methods '["full", "LoRA, r 8"]'
    python scripts/compare_methods.py --steps 100 --flags '[--precision, bf16-true]'
    python scripts/compare_methods.py --tokens 1000000

Interrupted, the same command goes on.
"""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from lit_gpt import InputError
from lit_gpt.cli import run
from lit_gpt.config import SAMPLE
from lit_gpt.data.read_files import open_text
from lit_gpt.studies.compare_methods import (
    METHODS,
    Budget,
    check,
    compare,
    fingerprint,
    seconds_per_step,
    settle,
    steps_for,
    write_budget,
)

SCRIPTS = Path(__file__).parents[1] / "finetune"


def main(
    checkpoint_dir: Path = SAMPLE,
    data_dir: Path = Path("data/docstrings"),
    out_dir: Path = Path("out/compare"),
    methods: list[str] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    general_text: Path | None = None,
    flags: list[str] | None = None,
) -> None:
    """Train with each method on the same records, and compare what it cost and gave.

    Args:
        checkpoint_dir: The base model.
        data_dir: What one of scripts/prepare_*.py wrote.
        out_dir: Where the runs, compare.md and compare.png go.
        methods: Which ones of those that lit_gpt/compare.py names. None is all.
        minutes: For all together, about. The steps that fit are found by a few of full fine-tuning. None is what
            out_dir was begun with, else 30.
        steps: In place of minutes, the optimizer steps of 16 records that each method takes.
        tokens: In place of minutes, about how many tokens each method reads, those of prompts too.
        general_text: A text that has nothing to do with the data, on which forgetting is measured. None is
            lit_gpt/studies/general_text.txt.
        flags: More flags for the scripts in finetune/.
    """
    methods = [*METHODS] if methods is None else methods
    if unknown := [name for name in methods if name not in METHODS]:
        raise InputError(f"No method is called {unknown[0]!r}. Known are: {'; '.join(METHODS)}.")
    if not methods:
        raise InputError(f"--methods is empty. Known are: {'; '.join(METHODS)}.")
    for name, value in (("minutes", minutes), ("steps", steps), ("tokens", tokens)):
        if value is not None and value <= 0:
            raise InputError(f"--{name} is {value}, expected more than 0.")
    if (minutes, steps, tokens).count(None) < 2:
        raise InputError("--minutes, --steps and --tokens all say when to stop: choose one.")
    if tokens is not None and any("global_batch_size" in flag for flag in flags or []):
        raise InputError("--tokens counts on 16 records a step: with another global_batch_size say --steps.")
    with open_text(general_text or Path(str(files("lit_gpt.studies") / "general_text.txt"))) as file:
        text = file.read()
    budget = Budget(str(checkpoint_dir), str(data_dir), fingerprint(text), steps or 0, flags or [], minutes)
    check(methods, SCRIPTS, budget, text)
    if tokens is not None:
        budget = replace(budget, steps=steps_for(tokens, data_dir))
    budget = settle(budget, out_dir)
    if not budget.steps:
        each = seconds_per_step(SCRIPTS, budget, out_dir)
        minutes = minutes or 30
        budget = replace(budget, steps=max(1, round(minutes * 60 / len(methods) / each)), minutes=minutes)
    write_budget(budget, out_dir)
    compare(methods, SCRIPTS, budget, text, out_dir)
    print(f"{(out_dir / 'compare.md').read_text(encoding='utf-8')}\nPlot: {out_dir / 'compare.png'}")


if __name__ == "__main__":
    run(main)
