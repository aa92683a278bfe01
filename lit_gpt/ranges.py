"""The ranges of numbers that users set: a number outside of its range is refused by the name of its flag."""

import math

from lit_gpt.errors import InputError

LEAST_PENALTY, LARGEST_PENALTY = 0.01, 100.0
"""The range of a repetition penalty. 1 changes nothing, and people use 1 to 2."""
LARGEST_SEED = 2**32 - 1
"""What scikit-learn and numpy take, too. What a run derives from it (see lit_gpt/train.py) fits into 64 bits."""


def check_penalty(penalty: float) -> None:
    """Raises InputError for a repetition penalty by which logits may leave the range of float32, and be no numbers."""
    check_range("--repetition_penalty", penalty, at_least=LEAST_PENALTY, at_most=LARGEST_PENALTY)


def check_range(
    flag: str,
    value: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises InputError if a number is not in its range, or not finite. None, where a flag may be that, is in it."""
    if value is None:
        return
    is_inside = (
        (isinstance(value, int) or math.isfinite(value))  # an int may be too large for a float
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if not is_inside:
        raise InputError(f"{flag} is {value}, expected {range_in_words(at_least, above, at_most, below)}.")


def range_in_words(at_least: float | None, above: float | None, at_most: float | None, below: float | None) -> str:
    """A range as a user reads it: "1 or more", "0 to 1", "more than 0 and at most 1"."""
    if at_least is not None and at_most is not None:
        return f"{at_least} to {at_most}"
    if at_least is not None and below is not None:
        return f"{at_least} to below {below}"
    parts = []
    if at_least is not None:
        parts.append(f"{at_least} or more")
    if above is not None:
        parts.append(f"more than {above}")
    if at_most is not None:
        parts.append(f"at most {at_most}")
    if below is not None:
        parts.append(f"less than {below}")
    return " and ".join(parts)


def check_seed(flag: str, seed: int) -> None:
    """Raises InputError for a seed that not every generator of random numbers takes."""
    check_range(flag, seed, at_least=0, at_most=LARGEST_SEED)
