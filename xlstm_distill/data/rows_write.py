"""Rows → events (`rows.py`), with the search for the row that each resembles."""

# mypy: disable-error-code="assignment,operator"
# (numba unifies numbers by its own rules.)

import numpy as np
from numba import njit
from numpy.typing import NDArray

from xlstm_distill.data.compiled import kernel
from xlstm_distill.data.events import BITS, CONTEXT, ID, VALUE
from xlstm_distill.data.rows import (
    ESCAPE,
    FLOOR,
    HIT,
    LENGTH,
    LEVEL_BITS,
    MIDDLE,
    MOST_BACK,
    QUALITIES,
    QUALITY,
    REFERENCE,
    STAYS,
    STEP_TABLE,
    TAIL,
    ZERO_TAIL,
)
from xlstm_distill.data.rows_both import BLOCK, rank_row, step_context

CANDIDATES = 3
"""References that are compared."""
PLACES = 3
"""Last rows remembered per id."""
HASH_BITS = 13
FARTHEST = 1 << 22
"""Rows back: with more plain bits the coder's states would not stay valid (`prior.rare_unit`)."""


@njit(inline="always")
def _event(context, symbol, bits, value):  # type: ignore[no-untyped-def]
    return np.uint64(symbol | (context << CONTEXT) | (bits << BITS) | (value << VALUE))


@njit(inline="always")
def _hash(token):  # type: ignore[no-untyped-def]
    product = (np.uint64(token) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    return np.int64(product >> np.uint64(32 - HASH_BITS))


@njit(inline="always")
def _octave(distance):  # type: ignore[no-untyped-def]
    octave = 0
    while distance >> (octave + 1):
        octave += 1
    return octave


@njit(inline="always")
def _level_event(context, new, guess, bits):  # type: ignore[no-untyped-def]
    """A level as difference from a guess, with so many plain bits, or as it is."""
    step = (new - guess) >> bits
    if abs(step) < MIDDLE:
        return _event(context, step + MIDDLE, bits, new - guess - (step << bits))
    return _event(context, ESCAPE, LEVEL_BITS, new)


@njit(nogil=True)
def _most_voted(votes, touched, best, best_votes):  # type: ignore[no-untyped-def]
    """Fill `best` with the rows of at least two votes that have most, then −1; clear the votes."""
    best_votes[:] = 1
    best[:] = -1
    for place in touched:
        vote = np.int64(votes[place])
        votes[place] = 0
        if vote > best_votes[CANDIDATES - 1]:
            spot = CANDIDATES - 1
            while spot > 0 and best_votes[spot - 1] < vote:
                best_votes[spot], best[spot] = best_votes[spot - 1], best[spot - 1]
                spot -= 1
            best_votes[spot], best[spot] = vote, place


@njit(nogil=True)
def _most_alike(t, rows, counts, hashes, stamps):  # type: ignore[no-untyped-def]
    """Which of the rows saves most for row t, at a byte per common id; −1 where it is not worth naming."""
    source, gain = -1, 16
    for row in rows:
        if row < 0:
            break
        if t - row >= FARTHEST:
            continue
        same = 0
        for j in range(counts[row]):
            same += stamps[hashes[row, j]] == t
        value = 8 * same - _octave(t - row)
        if value > gain:
            source, gain = row, value
    return source


@njit(inline="always")
def _step_event(step, number, novel):  # type: ignore[no-untyped-def]
    """The step to a new id: its symbol, see `step_table`."""
    symbol = step
    if step >= 32:
        octave = _octave(step) - 5
        symbol = 32 + 4 * octave + ((step - (32 << octave)) >> (3 + octave))
    meaning = STEP_TABLE[symbol]
    return _event(step_context(number, novel), symbol, meaning & 0xFF, step - (meaning >> 8))


@kernel()
def describe(
    tokens: NDArray[np.int32],
    token_levels: NDArray[np.int16],
    counts: NDArray[np.int32],
    tail_levels: NDArray[np.int16],
    length_bits: int,
    typical: NDArray[np.int64],
    nats: NDArray[np.int32],
    guesses: NDArray[np.int32],
) -> NDArray[np.uint64]:
    """Events of rows whose levels rise.

    Args:
        tokens: [T, k]; the first counts[t] of a row are all different.
        token_levels: [T, k].
        counts: [T].
        tail_levels: [T].
        length_bits: plain bits of a row's length; 0: every row has k.
    """
    positions, top_k = tokens.shape
    lowest = len(nats) - 1
    ids, levels = np.empty((positions, top_k), np.int32), np.empty((positions, top_k), np.int16)
    # Which entry of the row an id is, by its hash: valid where the stamp is the row's and the id is the same. Of two
    # ids of one hash the second counts; the first is written as a new one.
    stamps, entries = np.full(1 << HASH_BITS, -1, np.int32), np.empty(1 << HASH_BITS, np.int32)
    recent = np.full((1 << HASH_BITS, PLACES), -1, np.int32)
    hashes = np.empty((positions, top_k), np.int32)
    votes = np.zeros(positions + 1, np.int32)  # one more: where ids not seen before vote
    touched = np.empty(PLACES * top_k + 1, np.int32)
    best, best_votes = np.empty(CANDIDATES, np.int64), np.empty(CANDIDATES, np.int64)
    stayed = np.empty(top_k, np.bool_)
    keys, ranks = np.empty(top_k + BLOCK, np.int32), np.empty(top_k, np.int32)
    row_ids, row_levels, row_hashes = np.empty(top_k, np.int32), np.empty(top_k, np.int64), np.empty(top_k, np.int32)
    events = np.empty(positions * (8 + top_k // 4 + 2 * top_k), np.uint64)
    size = 0
    for t in range(positions):
        count, own = np.int64(counts[t]), tokens[t]
        if length_bits:
            events[size] = _event(LENGTH, 0, length_bits, count)
            size += 1
        used = 0
        for j in range(count):
            home = _hash(own[j])
            row_hashes[j] = home
            stamps[home], entries[home] = t, j
            for i in range(PLACES):
                place = recent[home, i]
                touched[used] = place
                used += votes[place] == 0
                votes[place] += 1
        # Rows that hold many of these ids where they stood last are the likely ones; the best of them are compared.
        votes[-1] = 0
        _most_voted(votes, touched[:used], best, best_votes)
        source = _most_alike(t, best, counts, hashes, stamps)
        there, floor, tail, stay, quality = 0, typical[0], typical[1], 0, 0
        for j in range(count):
            stayed[j] = False
        if source < 0:
            events[size] = _event(REFERENCE, 0, 0, 0)
            size += 1
        else:
            octave = _octave(t - source)
            events[size] = _event(REFERENCE, 1 + octave, octave, t - source - (1 << octave))
            size += 1
            there, tail = np.int64(counts[source]), np.int64(tail_levels[source])
        if there:
            floor = np.int64(levels[source, there - 1])
            for i in range(there):
                home = hashes[source, i]
                entry = entries[home]
                if stamps[home] == t and own[entry] == ids[source, i]:
                    stayed[entry] = True
                    row_ids[stay] = i  # place in the reference, until its level is written
                    row_levels[stay] = token_levels[t, entry]
                    stay += 1
            quality = min(stay * QUALITIES // there, QUALITIES - 1)
            events[size] = _event(QUALITY, quality, 0, 0)
            size += 1
            fours, done = (there + 3) >> 2, 0
            scale = (8 << 16) // fours
            for four in range(fours):
                mask = 0
                while done < stay and row_ids[done] < 4 * four + 4:
                    mask |= 1 << (row_ids[done] - 4 * four)
                    done += 1
                events[size] = _event(STAYS + quality * 8 + ((four * scale) >> 16), mask, 0, 0)
                size += 1
        shift = MOST_BACK
        if count:
            new = np.int64(token_levels[t, count - 1])
            events[size] = _level_event(FLOOR + (there > 0), new, floor, 0)
            size += 1
            shift += np.int64(nats[new]) - np.int64(nats[floor])
            floor = new
        new = np.int64(tail_levels[t])
        if tail > lowest:
            events[size] = _level_event(ZERO_TAIL, new, tail, 0)
        else:
            guess = np.int64(guesses[nats[tail] + shift])
            events[size] = _level_event(TAIL + min((guess >> 10) & 0x3F, 5), new, guess >> 16, guess & 0xFF)
        size += 1
        for i in range(stay):
            place, new = np.int64(row_ids[i]), row_levels[i]
            guess = np.int64(guesses[nats[levels[source, place]] + shift])
            events[size] = _level_event(HIT + ((guess >> 8) & 0xFF), new, guess >> 16, guess & 0xFF)
            size += 1
            row_ids[i] = ids[source, place]
            row_hashes[i] = hashes[source, place]
            keys[i] = np.int32((new << 16) | i)
        level, novel, number = floor, count - stay, 0
        for j in range(count - 1, -1, -1):
            if stayed[j]:
                continue
            new = np.int64(token_levels[t, j])
            events[size] = _step_event(level - new, number, novel)
            events[size + 1] = np.uint64(ID | (np.int64(own[j]) << VALUE))
            size += 2
            place = stay + number
            row_ids[place], row_levels[place], row_hashes[place] = own[j], new, _hash(own[j])
            keys[place] = np.int32((new << 16) | place)
            level = new
            number += 1
        rank_row(keys, count, ranks)
        for j in range(count):
            rank, home = ranks[j], row_hashes[j]
            ids[t, rank], levels[t, rank], hashes[t, rank] = row_ids[j], row_levels[j], home
            for i in range(PLACES - 1, 0, -1):
                recent[home, i] = recent[home, i - 1]
            recent[home, 0] = t
    return events[:size]
