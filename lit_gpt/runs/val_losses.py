"""The loss of each validation record, of `best` and of the last validation: `out_dir/val_losses.csv`.

    record,best: loss (lower is better),best: loss weight,last: loss (lower is better),last: loss weight
    3f09c1a2b4d5e6f7,1.25,12,1.5,12                                      the mean over 12 trained tokens

A record has its name by its content, so that two runs can be compared record by record without their models, even if
their data were prepared twice.
"""

from dataclasses import replace
from pathlib import Path

from lit_gpt.scores.record_scores import RecordScores, read_scores, write_scores

NAME = "val_losses.csv"
BEST = "best: loss"
LAST = "last: loss"


class ValLosses:
    """The file of a run, written anew by each validation. One process keeps it."""

    def __init__(self, out_dir: Path, goes_on: bool) -> None:
        """A run that goes on keeps the losses of its best validation.

        Raises:
            InputError: the file that it goes on from is damaged.
        """
        self.file = out_dir / NAME
        self.best: RecordScores | None = None
        if goes_on and self.file.is_file():
            for scores in read_scores(self.file):
                if scores.measure == BEST:
                    self.best = scores

    def write(self, losses: RecordScores, is_best: bool) -> None:
        """Keeps the losses of a validation."""
        if is_best:
            self.best = replace(losses, measure=BEST)
        columns = [] if self.best is None else [self.best]
        write_scores(self.file, [*columns, replace(losses, measure=LAST)])
