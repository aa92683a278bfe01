"""Scores that runs and evaluations have left behind, to be compared without a model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lit_gpt.errors import InputError
from lit_gpt.files import list_some, not_there
from lit_gpt.runs.val_losses import NAME as VAL_LOSSES
from lit_gpt.scores.record_scores import LOSS, RecordScores, read_scores


def read_stored(path: Path) -> list[RecordScores]:
    """The scores in a file; or the validation losses of `best`, in the out_dir of a run.

    Raises:
        InputError: there are none.
    """
    if path.is_file():
        return read_scores(path)
    if not path.exists():
        raise not_there(path, path.parent.glob("*"), "Name the out_dir of a run, or a file of scores.")
    if (path / VAL_LOSSES).is_file():
        of_best, *_ = read_scores(path / VAL_LOSSES)  # or of the last validation, if none could be the best
        return [replace(of_best, measure=LOSS)]
    evaluated = sorted(path.glob("scores-*.csv"))
    if evaluated:
        raise InputError(f"{path} holds the scores of several models. Name one of them: {list_some(evaluated)}.")
    raise InputError(
        f"{path} holds no scores: its run had no validation records, or is of an older version. scripts/evaluate.py"
        " --finetuned measures it."
    )


def comparable(scores: Mapping[str, list[RecordScores]]) -> dict[str, list[RecordScores]]:
    """The measures that all have, in the order of the first.

    Raises:
        InputError: they have none in common.
    """
    first, *others = scores
    common = [one.measure for one in scores[first]]
    for name in others:
        theirs = {one.measure for one in scores[name]}
        common = [measure for measure in common if measure in theirs]
    if not common:
        measures = "; ".join(f"{name} has {list_some(one.measure for one in of)}" for name, of in scores.items())
        raise InputError(f"There is no measure that all have: {measures}.")
    return {
        name: [{one.measure: one for one in of_model}[measure] for measure in common]
        for name, of_model in scores.items()
    }
