"""Levels of log-probabilities: steps that cost equal divergence where it counts, equal steps in nats below.

A relative error δ of a probability p costs p·δ²/2 of KL divergence. Steps that are equal in √p cost the same
everywhere, and are wide where p is small: level i stands for √p = 1 − i/steps. Where such a step would be wider than
`WIDEST` = ln 1.6 = 0.47 nats, the levels go on in steps of that width down to `LOWEST_NATS`. So

    |log p̂ − log p| ≤ min(1.1 / (steps·√p), 0.25)    for log p ≥ −60; what lies below is given as about −60;

`steps` = 41·√(k + 1) keeps the mean KL of rows of k below 1e-4 nats: it is (k + 1) / (6 · steps²) where every step is
equal in √p, less where some are narrower. Probability one and zero are exact.
All levels come from +, −, ×, ÷, which round alike on every machine.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.data.rows import LOWEST_NATS, NATS, guess_table


class CodecError(ValueError):
    """Targets that cannot be written, or bytes that are not targets as this version writes them."""


SHRINK = 0.625
WIDEST = -math.log(SHRINK)
FEWEST_STEPS, MOST_STEPS = 64, 2048
CELLS = 256
"""Cells per nat of the table in which quantisation begins to look."""


@dataclass(frozen=True)
class Grid:
    """Tables of L levels and, as level L, of probability zero."""

    values: NDArray[np.float32]
    """[L + 1], log-probability of each level; the last −inf."""
    nats: NDArray[np.int32]
    """[L], −64 times the same, rounded: what the coder guesses with."""
    guesses: NDArray[np.int32]
    """`guess_table` of them."""
    edges: NDArray[np.float64]
    """[L], log-probability below which the next level begins; of the last level −inf."""
    first: NDArray[np.int16]
    """Level at the upper end of each cell of 1/256 nat."""


def default_steps(top_k: int) -> int:
    """Steps between √p = 1 and 0 that keep the mean KL of rows of `top_k` below 1e-4."""
    return min(max(round(41 * math.sqrt(top_k + 1)), FEWEST_STEPS), MOST_STEPS)


@lru_cache(maxsize=8)
def grid(steps: int) -> Grid:
    """The levels for `steps` steps of √p."""
    probabilities, edges = [1.0], []
    for i in range(1, steps):
        root = 1 - i / steps
        if root * root < SHRINK * probabilities[-1]:
            break
        edges.append((1 - (i - 0.5) / steps) ** 2)
        probabilities.append(root * root)
    while probabilities[-1] * SHRINK > math.exp(-LOWEST_NATS):
        edges.append(probabilities[-1] * 0.8)  # in nats half-way, nearly: √0.625 = 0.79
        probabilities.append(probabilities[-1] * SHRINK)
    values = np.log(np.array(probabilities))
    nats = np.rint(-values * NATS).astype(np.int32)
    bounds = np.append(np.log(np.array(edges)), -np.inf)
    first = np.searchsorted(-bounds[:-1], np.arange(LOWEST_NATS * CELLS + 1) / CELLS, side="left").astype(np.int16)
    values = np.append(values, -np.inf).astype(np.float32)
    tables = (values, nats, guess_table(nats), bounds, first)
    for table in tables:
        table.flags.writeable = False
    return Grid(*tables)
