"""The split into training and validation records: no prompt is on both sides.

A record goes where it says itself, or else a share of the distinct prompts is set aside. Prompts are compared by their
hashes, once as texts and once as the tokens that are stored.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lit_gpt.data.dataset import NEITHER, TRAIN, VAL

UNNAMED = -1  # for a record that does not say to which split it belongs
LEAKED = "training on a validation prompt"  # under this name the training records are counted that are left out


def hash_of(content: bytes, seed: int) -> int:
    """64 bits of sha256. The seed decides the order of the hashes, and by this which prompts are set aside."""
    return int.from_bytes(hashlib.sha256(f"{seed} ".encode() + content).digest()[:8], "big")


def same_prompt_groups(texts: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """Group numbers, (n,). Records with the same text or the same tokens are in one group, also through other records:

        record           0   1   2   3
        text             a   a   b   c
        stored tokens    x   y   y   z
        group            0   0   0   1      0 and 2 have nothing in common but record 1

    Either alone would let a prompt through: cutting makes the same tokens of different texts, and a token across the
    beginning of an answer makes different tokens of the same text.
    """
    keys = []
    for hashes in (texts, tokens):
        _, key = np.unique(np.asarray(hashes, np.uint64), return_inverse=True)
        keys.append(key)

    # every record takes the least group number among those that share a key with it, until nothing changes
    group = keys[0]
    while True:
        before = group
        for key in keys:
            least = np.full(len(key), len(key))
            np.minimum.at(least, key, group)
            group = least[key]
        if (group == before).all():
            return group


class Split(NamedTuple):
    """For each record TRAIN, VAL or NEITHER, (n,) uint8, and how many are neither."""

    codes: np.ndarray
    n_leaked: int


def choose_split(named: Sequence[int], prompts: Sequence[int] | np.ndarray, val_fraction: float) -> Split:
    """Assigns each record to training, validation or neither.

    Args:
        named: What each record says itself: TRAIN, VAL or UNNAMED.
        prompts: A number for each record. Records with the same number have the same prompt.
        val_fraction: The share of the prompts without a name that goes to validation.

    Training records that have the prompt of a validation record are left out.
    """
    named_split = np.asarray(named, np.int8)
    # unique sorts the hashes, and sorted hashes are in a random order
    _, prompt_of = np.unique(np.asarray(prompts, np.uint64), return_inverse=True)
    n_prompts = int(prompt_of.max()) + 1

    # prompts that have a name
    in_train = np.zeros(n_prompts, bool)
    in_train[prompt_of[named_split == TRAIN]] = True
    in_val = np.zeros(n_prompts, bool)
    in_val[prompt_of[named_split == VAL]] = True

    # a share of the others; at least one, if that is to be all there is to validate on
    free = np.flatnonzero(~in_train & ~in_val)
    n_val = round(val_fraction * len(free))
    if val_fraction > 0 and n_val == 0 and len(free) > 1 and not in_val.any():
        n_val = 1
    in_val[free[:n_val]] = True

    codes = np.where(in_val[prompt_of], VAL, TRAIN)
    is_leaked = in_val[prompt_of] & (named_split == TRAIN)
    codes[is_leaked] = NEITHER
    return Split(codes.astype(np.uint8), int(is_leaked.sum()))
