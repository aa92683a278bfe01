"""TODO doc of name_patterns"""

import re
from collections.abc import Iterable

from lit_gpt.errors import InputError


def check_patterns(patterns: Iterable[str]) -> None:
    """Raises InputError where what is to choose modules or parameters by their names is no pattern."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f'{pattern!r} is no pattern of names ({error}). One is attn.q or "mlp.fc_[12]".') from None
