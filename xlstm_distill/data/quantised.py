"""Targets as the coder takes them: levels instead of log-probabilities, rows in order, their faults found."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.data.compiled import kernel
from xlstm_distill.data.grid import CELLS, CodecError, Grid


class Rows(NamedTuple):
    """T rows of k places; in the first counts[t] of row t stand different ids by rising level."""

    ids: NDArray[np.int32]
    levels: NDArray[np.int16]
    counts: NDArray[np.int32]
    tails: NDArray[np.int16]


def quantised(
    ids: NDArray[np.integer],
    log_probs: NDArray[np.floating],
    tail_log_mass: NDArray[np.floating],
    vocab_size: int,
    grid: Grid,
) -> Rows:
    """Quantise and check; arguments as of `codec.encode`.

    Raises:
        CodecError: shapes or values do not fit, or an id stands twice in a row.
    """
    if ids.ndim != 2 or log_probs.shape != ids.shape or tail_log_mass.shape != ids.shape[:1]:
        raise CodecError(f"shapes {ids.shape}, {log_probs.shape}, {tail_log_mass.shape}: expected [T, k], [T, k], [T]")
    levels, tails = np.empty(ids.shape, np.int16), np.empty(len(ids), np.int16)
    for values, found in ((log_probs, levels.ravel()), (tail_log_mass, tails)):
        if not _levels(_float32(values), grid.edges, grid.first, found):
            raise CodecError("log-probabilities above 0 or NaN")
    tokens = np.array(ids, np.int64, order="C")
    counts, fault = np.empty(len(ids), np.int32), np.zeros(2, np.int64)
    _arrange(tokens, levels, len(grid.edges), vocab_size, counts, fault)
    if fault[0]:
        row, token = divmod(int(fault[1]), ids.shape[1])
        what = f"expected 0 to {vocab_size - 1}" if fault[0] == 1 else "stands twice"
        raise CodecError(f"row {row}: id {tokens[row, token]} {what}")
    return Rows(tokens.astype(np.int32), levels, counts, tails)


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what is too low for float32 is probability zero
        return np.ascontiguousarray(values, np.float32).ravel()


@kernel()
def _levels(
    log_probs: NDArray[np.float32], edges: NDArray[np.float64], first: NDArray[np.int16], levels: NDArray[np.int16]
) -> bool:
    """Write the level of each value into `levels`; False where one is NaN or clearly above 0."""
    zero = np.int16(len(edges))
    for i in range(len(log_probs)):
        value = log_probs[i]
        if not value <= 1e-3:
            return False
        if value == -np.inf:
            levels[i] = zero
            continue
        level = np.int64(first[np.int64(min(max(-value, np.float32(0)) * CELLS, np.float32(len(first) - 1)))])
        while value < edges[level]:
            level += 1
        levels[i] = level
    return True


@kernel()
def _arrange(
    ids: NDArray[np.int64],
    levels: NDArray[np.int16],
    zero: int,
    vocab_size: int,
    counts: NDArray[np.int32],
    fault: NDArray[np.int64],
) -> None:
    """Sort the rows that are not in order, count what is above zero, and note the first fault and its place."""
    positions, top_k = ids.shape
    size = 64
    while size < 4 * top_k:
        size *= 2
    stamps, seen = np.full(size, -1, np.int64), np.empty(size, np.int64)
    for t in range(positions):
        own, level = ids[t], levels[t]
        for j in range(1, top_k):
            if level[j] < level[j - 1]:
                order = np.argsort(level, kind="mergesort")
                own[:], level[:] = own[order], level[order]
                break
        count = top_k
        while count and level[count - 1] == zero:
            count -= 1
        counts[t] = count
        for j in range(count):
            if own[j] < 0 or own[j] >= vocab_size:
                fault[0], fault[1] = 1, t * top_k + j
                return
            place = own[j] & (size - 1)
            while stamps[place] == t:
                if seen[place] == own[j]:
                    fault[0], fault[1] = 2, t * top_k + j
                    return
                place = (place + 1) & (size - 1)
            stamps[place], seen[place] = t, own[j]
