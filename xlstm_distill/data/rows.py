"""Rows of sparse targets ↔ events of the entropy coder: each row as a change of an earlier one that it resembles.

A row holds n ids with their levels (quantised log-probabilities, `grid.py`; 0 is probability one, higher is smaller).
Events in order:

1. n, where rows of the sample differ in it;
2. the reference: no row, or how far back, in octaves with plain bits below;
3. how much of the reference stays (in eighths), then four of its ids per symbol: which stay;
4. the floor (level of the row's least probable id) as difference from the reference's, and by this shift from what the
   reference has: the tail, and the level of each id that stays;
5. the other ids, from the floor upwards: the step in level and the id, so their order costs nothing where levels are
   far apart.

The row is then put in order by level; ids of one level stand in the order of their events. Reader and writer do the
same arithmetic on integers, so they agree on every machine.
"""

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.data.events import SYMBOLS

REFERENCE, QUALITY, LENGTH, FLOOR, ZERO_TAIL, TAIL, STEP, HIT, STAYS = 0, 1, 2, 3, 5, 6, 12, 44, 68
"""First context of each kind."""
CONTEXTS = STAYS + 64
OCTAVES = 24
"""Symbols of the reference: 0: none; 1 + e: 2^e to 2^(e+1) − 1 rows back."""
QUALITIES = 8
LEVEL_BITS = 12
"""Plain bits of a level that no other symbol reaches."""
ESCAPE = SYMBOLS - 1
MIDDLE = 31
LOWEST_NATS, NATS = 60, 64
"""Log-probability of the last level above zero, negated; units per nat of the table by which levels are guessed."""


def step_table() -> NDArray[np.int64]:
    """Smallest step << 8 | plain bits of each symbol: steps below 32 have their own, then four share an octave."""
    symbols = np.arange(SYMBOLS)
    octave = np.maximum(symbols - 32, 0) // 4
    base = np.where(symbols < 32, symbols, (32 << octave) + (symbols & 3) * (8 << octave))
    return (base << 8) | np.where(symbols < 32, 0, 3 + octave)


STEP_TABLE = step_table()

GUESSES = 3 * LOWEST_NATS * NATS + 1
"""Entries of the table of guesses: where a log-probability may lie after it was shifted."""
MOST_BACK = LOWEST_NATS * NATS
BUCKETS = 24
"""Contexts of a level that is guessed: by half nats below probability one."""


def guess_table(nats: NDArray[np.int32]) -> NDArray[np.int32]:
    """What is guessed of a level, by −log-probability in 1/64 nat + MOST_BACK: level << 16 | context << 8 | plain bits.

    The plain bits of a level's difference are those that are all noise, because the steps are fine.

    Args:
        nats: [L], of each level.
    """
    places = np.clip(np.arange(GUESSES) - MOST_BACK, 0, MOST_BACK)
    levels = np.minimum(np.searchsorted((nats[:-1] + nats[1:] + 1) // 2, places, side="right"), len(nats) - 1)
    widths = np.append(np.diff(nats), NATS)[levels]
    bits = (widths[:, None] << np.arange(1, 6) <= NATS // 8).sum(1)
    return ((levels << 16) | (np.minimum(nats[levels] >> 5, BUCKETS - 1) << 8) | bits).astype(np.int32)
