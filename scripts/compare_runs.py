"""Which of several runs is better, and by how much: by the scores that each of them keeps, without a model.

    python scripts/compare_runs.py out/lora/docstrings out/lora/r16
    python scripts/compare_runs.py out/evaluate/demo/scores-base.csv out/evaluate/demo/scores-demo.csv

The first one is what the others are compared with, record by record.
"""

from pathlib import Path

from lit_gpt import InputError
from lit_gpt.cli import run
from lit_gpt.evaluation.report import explanation, scores_table
from lit_gpt.evaluation.stored_scores import comparable, read_stored
from lit_gpt.runs.side_by_side import model_names


def main(runs: list[Path]) -> None:
    """Compare runs by the scores that they keep.

    Args:
        runs: Two or more out_dirs of fine-tuning, which have the loss of each validation record; or files of scores,
            which scripts/evaluate.py writes. They need no flag if they come first.
    """
    if len(runs) < 2:
        raise InputError(f"There is nothing to compare {runs[0] if runs else 'with'} with. Name two runs or more.")
    scores = dict(zip(model_names(runs), map(read_stored, runs), strict=True))
    scores = comparable(scores)
    print(f"{scores_table(scores)}\n\n{explanation(scores)}")


if __name__ == "__main__":
    run(main)
