"""What the reader and the writer of rows (`rows.py`) do alike. Compiled by numba."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from xlstm_distill.data.rans import Whole
from xlstm_distill.data.rows import STEP

NO_KEY = (1 << 31) - 1
BLOCK = 8
"""Keys at a time; arrays of keys have so many places more than a row."""


@njit(inline="always")
def step_context(number: Whole, novel: Whole) -> Whole:
    """By how many new ids stand below and above."""
    above = novel - number
    return STEP + min(number, 7) * 4 + (above > 2) + (above > 6) + (above > 14)


@njit(inline="always")
def rank_row(keys: NDArray[np.int32], count: Whole, ranks: NDArray[np.int32]) -> None:
    """ranks[i] = how many keys (all different) are below keys[i]; by counting, which runs in vector registers."""
    if count <= 384:
        for i in range(np.uint64(count)):
            ranks[i] = 0
        for i in range(np.uint64(BLOCK)):
            keys[np.uint64(count) + i] = NO_KEY
        for j in range(np.uint64(0), np.uint64(count), np.uint64(BLOCK)):
            a, b, c, d = keys[j], keys[j + np.uint64(1)], keys[j + np.uint64(2)], keys[j + np.uint64(3)]
            e, f, g, h = keys[j + np.uint64(4)], keys[j + np.uint64(5)], keys[j + np.uint64(6)], keys[j + np.uint64(7)]
            for i in range(np.uint64(count)):
                key = keys[i]
                below = np.int32(a < key) + np.int32(b < key) + np.int32(c < key) + np.int32(d < key)
                below += np.int32(e < key) + np.int32(f < key) + np.int32(g < key) + np.int32(h < key)
                ranks[i] += np.int32(below)
    else:
        ranks[np.argsort(keys[:count])] = np.arange(count).astype(np.int32)
