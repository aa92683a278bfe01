"""Choosing modules and parameters by patterns of their names: the rules, each written once.

A name is a path in the model, as in a state dict. Patterns are regular expressions for whole parts of it:

    transformer.h.3.mlp.fc_1          fits by its end to:         fc_1    mlp.fc_[12]    3.mlp.fc_1
    transformer.h.3.mlp.fc_1.weight   fits by its beginning to:   transformer.h.3    transformer.h.[0-3].mlp
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lit_gpt.errors import InputError

Value = TypeVar("Value")


def check_patterns(patterns: Iterable[str]) -> None:
    """Makes sure that patterns which a user typed are regular expressions: `attn.q` is one, `attn.(` is not.

    Raises:
        InputError: one of them is none.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:  # TypeError: a number, as in {1: 4}
            raise InputError(f'{pattern!r} is no pattern of names ({error}). One is attn.q or "mlp.fc_[12]".') from None


def matches_end(name: str, pattern: str) -> bool:
    """Whether a pattern is for the last parts of a name, or for all of it.

    `attn.q` matches transformer.h.1.attn.q, but not transformer.h.1.cross_attn.q nor transformer.h.1.attn.q.weight.
    """
    # the group keeps the alternatives of a pattern such as q|k together
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def matches_beginning(name: str, pattern: str) -> bool:
    """Whether a pattern is for the first parts of a name, or for all of it. It may end in a dot.

    `transformer.h.1` matches transformer.h.1.attn.q.weight, but not transformer.h.10.attn.q.weight.
    """
    # after the pattern: the rest of a name whose dot the pattern has already read, or a dot and the rest, or nothing
    return re.fullmatch(rf"(?:{pattern})(?:(?<=\.).*|\..*)?", name) is not None


def value_by_end(name: str, values: Mapping[str, Value], default: Value) -> Value:
    """The value of the first pattern that matches the end of a name; `default` if there is none.

    `value_by_end("transformer.h.1.attn.q", {"attn.q": 16, "q|k": 4}, default=8)` is 16. It is the rule of peft's
    rank_pattern and alpha_pattern, too.
    """
    for pattern, value in values.items():
        if matches_end(name, pattern):
            return value
    return default
