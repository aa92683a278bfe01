"""From gradients to answers: which records made a loss lower, which made it higher, and which do the same.

Without record i the trained weights would be others by about H^-1 g_i, and the loss on a target with gradient t by

    influence of i  =  t (H + damping)^-1 g_i           H = sum of g_j g_j^T over all training records

(Koh and Liang 2017, arXiv 1703.04730; with gradients in place of the Hessian, and projected, TRAK: Park et al. 2023,
arXiv 2303.14186). H tells what only this record teaches from what hundreds teach, so that a near-duplicate of the
target stands out by far.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ROWS = 1024  # of gradients that are read at a time
DAMPING = 0.3


class Pair(NamedTuple):
    """Two records whose gradients point the same way."""

    first: int
    second: int
    cosine: float


def influences(gradients: np.ndarray, targets: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """By how much the loss of each target would be higher without each record, (m, n) float64, as an estimate.

    Args:
        gradients: Of n records, (n, size).
        targets: Gradients of the losses of m targets, (m, size).
        damping: A share of the mean squared length of a gradient, added to H. It has to be above 0.
    """
    n, size = gradients.shape
    if n <= size:
        # the same by a matrix of records: G^T (G G^T + d)^-1 = (G^T G + d)^-1 G^T
        H = products(gradients)
        add_damping(H, damping, n)
        to_records = np.concatenate([rows @ targets.T for rows in parts(gradients)])  # (n, m)
        return np.linalg.solve(H, to_records).T
    H = np.zeros((size, size))
    for rows in parts(gradients):
        H += rows.T @ rows
    add_damping(H, damping, n)
    directions = np.linalg.solve(H, targets.T.astype(np.float64))  # (size, m)
    return np.concatenate([rows @ directions for rows in parts(gradients)]).T


def parts(gradients: np.ndarray) -> Iterator[np.ndarray]:
    """All rows of a matrix that may be mapped into memory, some of them at a time, in float64."""
    for start in range(0, len(gradients), ROWS):
        yield gradients[start : start + ROWS].astype(np.float64)


def products(gradients: np.ndarray) -> np.ndarray:
    """The products of the gradients of all records with each other, (n, n) float64."""
    return np.concatenate([rows @ gradients.T for rows in parts(gradients)])


def add_damping(H: np.ndarray, damping: float, n: int) -> None:
    """Adds a share of the mean squared length of the n gradients to the diagonal, in place."""
    H[np.diag_indices_from(H)] += damping * np.trace(H) / n


def alike(gradients: np.ndarray, least: float, most: int) -> list[Pair]:
    """The pairs of records whose gradients have the largest cosines: those of `least` or more, `most` pairs at most."""
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    unit = gradients / np.maximum(lengths, np.finfo(np.float32).tiny)
    pairs = []
    for start in range(0, len(unit), ROWS):
        cosines = unit[start : start + ROWS] @ unit.T
        # each pair once
        cosines[np.tril_indices_from(cosines, start)] = -1
        for row, column in np.argwhere(cosines >= least):
            pairs.append(Pair(start + int(row), int(column), float(cosines[row, column])))
    pairs.sort(key=lambda pair: -pair.cosine)
    return pairs[:most]
