"""What each method costs and gives, on your model and data.

python scripts/compare_methods.py
python scripts/compare_methods.py --minutes 5 --methods '["full", "LoRA, r 8, all linears"]'
python scripts/compare_methods.py --steps 100 --precision bf16-true
python scripts/compare_methods.py --tokens 1000000

Interrupted, the same command goes on.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lit_gpt import InputError
from lit_gpt.cli import PassedOn, flags_of, run
from lit_gpt.config import SAMPLE
from lit_gpt.evaluation.forgetting import read_general_text
from lit_gpt.lock import hold
from lit_gpt.ranges import check_range
from lit_gpt.studies.compare_methods import (
    CANDIDATES,
    Budget,
    check_comparison,
    compare,
    records_fingerprint,
    steps_for,
    steps_within,
    stored_budget,
    text_fingerprint,
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
    flags: PassedOn = (),
) -> None:
    """Train with each method on the same records, and compare what it cost and gave.

    All flags that are not listed here go to the scripts in finetune/, such as --precision: only those that all of them
    have can be given.

    Args:
        checkpoint_dir: The base model.
        data_dir: The folder that one of scripts/prepare_*.py wrote.
        out_dir: Where the runs, compare.md and compare.png go.
        methods: Names in CANDIDATES of lit_gpt/studies/compare_methods.py. None is all.
        minutes: For all of it, about: starting, loading and validating each method, too. The steps that fit are found
            by a few of full fine-tuning; each method takes one at the least. None is what out_dir was begun with, else
            30.
        steps: In place of minutes, the optimizer steps of 16 records that each method takes.
        tokens: In place of minutes, about how many tokens each method reads, those of prompts too.
        general_text: A text that has nothing to do with the data, on which forgetting is measured. None is
            lit_gpt/evaluation/general_text.txt.
        flags: Flags for the scripts in finetune/.
    """
    methods = list(CANDIDATES) if methods is None else methods
    check_methods(methods)
    check_end(minutes, steps, tokens, flags)

    # what all methods have in common
    text = read_general_text(general_text)
    budget = Budget(
        checkpoint_dir=str(checkpoint_dir),
        data_dir=str(data_dir),
        general_text=text_fingerprint(text),
        steps=steps or 0,
        flags=list(flags),
        minutes=minutes,
    )
    check_comparison(methods, SCRIPTS, budget, text, own_flags=flags_of(main))
    budget = replace(budget, records=records_fingerprint(data_dir))

    # the steps of each method: those that were asked for, those of the run that is continued, or as many as fit
    if tokens is not None:
        budget = replace(budget, steps=steps_for(tokens, data_dir))
    hold(out_dir)
    budget = stored_budget(budget, out_dir)
    if not budget.steps:
        minutes = minutes or 30
        steps = steps_within(minutes, methods, SCRIPTS, budget, out_dir)
        budget = replace(budget, steps=steps, minutes=minutes)
    write_budget(budget, out_dir)

    # train, measure, show
    compare(methods, SCRIPTS, budget, text, out_dir)
    print((out_dir / "compare.md").read_text(encoding="utf-8"))
    print(f"Plot: {out_dir / 'compare.png'}")


def check_methods(methods: list[str]) -> None:
    """Raises InputError if a method is none that can be compared, or if there are none."""
    names = "; ".join(CANDIDATES)
    for name in methods:
        if name not in CANDIDATES:
            raise InputError(f"No method is called {name!r}. Known are: {names}.")
    if not methods:
        raise InputError(f"--methods is empty. Known are: {names}.")


def check_end(minutes: float | None, steps: int | None, tokens: int | None, flags: Sequence[str]) -> None:
    """Raises InputError if the flags that say when to stop are not above 0, or contradict each other."""
    for name, value in (("minutes", minutes), ("steps", steps), ("tokens", tokens)):
        check_range(f"--{name}", value, above=0)
    if (minutes, steps, tokens).count(None) < 2:
        raise InputError("--minutes, --steps and --tokens all say when to stop: choose one.")
    if tokens is not None and any("global_batch_size" in flag for flag in flags):
        raise InputError("--tokens counts on 16 records a step: with another global_batch_size say --steps.")


if __name__ == "__main__":
    run(main)
