"""How long the training records are, and what a shorter max_seq_length would leave of them."""

from typing import Any

import numpy as np

from lit_gpt.data.dataset import epoch_order
from lit_gpt.data.too_long import TooLong, join_pieces, lengths_after

# The batches whose size is shown are those of a training run with the usual settings
BATCH = 16  # records: the scripts' usual micro-batch
SEED = 1337  # the scripts' usual one

# In place of a prompt's length
TEXT = -1  # the record is a text, or its beginning
CONTINUED = -2  # the record goes on with the text of the record before

PERCENTILES = {"shortest": 0, "quarter": 25, "median": 50, "three_quarters": 75, "95_percent": 95, "longest": 100}


def length_percentiles(lengths: np.ndarray) -> dict[str, int]:
    """The length of the shortest record, the quartiles, and so on."""
    return {name: int(np.percentile(lengths, percentile)) for name, percentile in PERCENTILES.items()}


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest length, longest length, how many records) of each of at most 16 bars of equal width."""
    width = max(1, -(-int(lengths.max()) // 16))
    counts = np.bincount((lengths - 1) // width)
    bars = []
    for i, count in enumerate(counts):
        shortest = i * width + 1
        bars.append((shortest, shortest + width - 1, int(count)))
    return bars


def cutoff_table(
    lengths: np.ndarray, prompt_lengths: np.ndarray, heads: np.ndarray, too_long: TooLong
) -> list[dict[str, Any]]:
    """A row for each max_seq_length: what preparing the same records with it would leave, cut and drop.

    Args:
        lengths: (n,) how many tokens each training record has.
        prompt_lengths: (n,) how many of them come before the first answer; TEXT or CONTINUED for texts.
        heads: (n,) how many of them stay when a prompt is cut: 1 if there is a BOS token.
        too_long: What is done with longer conversations.
    """
    powers = [2**i for i in range(5, 21)]
    limits = [power for power in powers if lengths.min() < power < lengths.max()]
    limits.append(int(lengths.max()))

    # what a shorter limit cuts is the text as a whole
    lengths, first = join_pieces(lengths, is_continued=prompt_lengths == CONTINUED)
    prompt_lengths = prompt_lengths[first]
    heads = heads[first]

    is_text = prompt_lengths == TEXT

    table = []
    for limit in limits:
        shortened = lengths_after(limit, lengths, prompt_lengths, heads, is_text, too_long)
        row = {
            "max_seq_length": limit,
            "records": len(shortened.lengths),
            "cut": shortened.n_cut,
            "dropped": shortened.n_dropped,
            "tokens_per_epoch": int(shortened.lengths.sum()),
            "largest_batch": largest_batch(shortened.lengths),
        }
        table.append(row)
    return table


def largest_batch(lengths: np.ndarray) -> int:
    """How many tokens the largest batch of the first epoch has."""
    shuffled = lengths[epoch_order(len(lengths), 0, SEED)]
    first_of_batch = np.arange(0, len(lengths), BATCH)
    batches = np.add.reduceat(shuffled, first_of_batch)
    return int(batches.max(initial=0))
