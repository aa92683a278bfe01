"""Records that cannot be used, in a file whose other records can: counted and shown, and only many of them stop.

A bad record is one with a fault of its own: a line that is no JSON, a content that is a number, a conversation that the
chat template refuses. A fault of the file as a whole (it is missing, it is not UTF-8) stops at once.
"""

from lit_gpt.errors import InputError

BAD = "that cannot be used"  # under this name they are counted
MOST = 0.05  # the share of the records above which bad ones stop
SOON = 100  # bad records after which reading on is vain if they are the majority
N_SHOWN = 3


class BadRecords:
    """The bad records of a source, as they come.

    Args:
        strict: Whether the first one stops.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.n_records = 0
        """All records so far, good ones included."""
        self.n_bad = 0
        self.first: list[str] = []
        """The faults of the first ones, with their numbers."""

    def add(self, error: InputError, number: int) -> None:
        """Counts the bad record `number`, counted from 1, whose fault is `error`.

        Raises:
            InputError: `strict`; or there are hundreds, and most records are bad.
        """
        if self.strict:
            raise error
        self.n_bad += 1
        if len(self.first) < N_SHOWN:
            self.first.append(str(error))
        if self.n_bad >= SOON and self.n_bad > number / 2:
            raise InputError(f"{self.first[0]} {self.n_bad:,} of the first {number:,} records cannot be used.")

    def check_share(self) -> None:
        """Raises InputError if too many of all records are bad."""
        if self.n_bad <= MOST * self.n_records:
            return
        sentence = self.first[0]
        if self.n_records > 1:
            sentence += (
                f" {self.n_bad:,} of {self.n_records:,} records cannot be used: more than {MOST:.0%}, so nothing is"
                " written."
            )
        raise InputError(sentence)
