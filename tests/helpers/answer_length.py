"""A metric of a user's own, for --train.metric tests/helpers/answer_length.py:judge."""

from collections.abc import Mapping
from typing import Any


def judge(record: Mapping[str, Any], answer: str) -> float:
    """The characters of an answer: random models have answers of different lengths, and none that are right."""
    return float(len(answer))
