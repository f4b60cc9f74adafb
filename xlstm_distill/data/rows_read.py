"""Events → rows (`rows.py`): the loop that limits how fast targets are read."""

# mypy: disable-error-code="assignment,operator,arg-type"
# (numba unifies numbers by its own rules.)

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.data.compiled import kernel
from xlstm_distill.data.events import FIRST, STATES
from xlstm_distill.data.rans import plain, refill, take, take_bucket
from xlstm_distill.data.rows import (
    ESCAPE,
    FLOOR,
    HIT,
    LENGTH,
    LEVEL_BITS,
    MIDDLE,
    MOST_BACK,
    OCTAVES,
    QUALITIES,
    QUALITY,
    REFERENCE,
    STAYS,
    STEP_TABLE,
    TAIL,
    ZERO_TAIL,
)
from xlstm_distill.data.rows_both import BLOCK, rank_row, step_context


def spare_words(top_k: int) -> int:
    """Words that `read` wants behind those it was given: what one row can take."""
    return 3 * top_k + 16


@kernel(error_model="numpy")
def read(
    words: NDArray[np.uint32],
    length_bits: int,
    slots: NDArray[np.uint8],
    packed: NDArray[np.uint32],
    id_slots: NDArray[np.uint16],
    id_packed: NDArray[np.uint32],
    id_places: NDArray[np.int64],
    id_tokens: NDArray[np.int32],
    typical: NDArray[np.int64],
    nats: NDArray[np.int32],
    guesses: NDArray[np.int32],
    values: NDArray[np.float32],
    vocabulary: int,
    ids: NDArray[np.int32],
    log_probs: NDArray[np.float32],
    tails: NDArray[np.float32],
) -> int:
    """Fill ids [T, k], log_probs [T, k], tails [T].

    Args:
        words: what `write` made, and `spare_words` more, which a damaged row may read.
        length_bits: plain bits of a row's length; 0: every row has k.

    Returns:
        0, or the number of what is wrong with the words.
    """
    positions, top_k = ids.shape
    flat_ids, flat_log_probs = ids.ravel(), log_probs.ravel()
    lowest = len(nats) - 1
    end = np.uint64(len(words) - (3 * top_k + 16))
    states = np.empty(STATES, np.uint64)
    for i in range(STATES):
        states[i] = np.uint64(words[2 * i]) | (np.uint64(words[2 * i + 1]) << np.uint64(32))
    cursor = np.uint64(2 * STATES)
    heights = np.empty(positions * top_k, np.int16)  # nats of each level
    counts, floors, tail_levels = np.empty((3, positions), np.int64)
    kept = np.empty(top_k + 8, np.int64)
    keys, ranks = np.empty(top_k + BLOCK, np.int32), np.empty(top_k, np.int32)
    row_ids, places = np.empty(top_k, np.int32), np.empty(top_k, np.int64)
    plans = np.empty(top_k, np.int32)
    known, no_key = len(id_tokens), len(nats) << 16
    limit = known + vocabulary
    turn = 0
    for t in range(positions):
        count = top_k
        if length_bits:
            _, state = take(states[np.uint64(turn & 7)], LENGTH, slots, packed)
            count = plain(state, length_bits)
            states[np.uint64(turn & 7)], cursor = refill(state, length_bits, words, cursor)
            turn += 1
            if count > top_k:
                return 1
        octave, state = take(states[np.uint64(turn & 7)], REFERENCE, slots, packed)
        bits = max(octave - 1, 0)
        distance = plain(state, bits) + (1 << bits)
        states[np.uint64(turn & 7)], cursor = refill(state, bits, words, cursor)
        turn += 1
        there, floor, tail, stay, quality = 0, typical[0], typical[1], 0, 0
        source = t
        if octave:
            if octave > OCTAVES or distance > t:
                return 2
            source = t - distance
            there, tail = counts[source], tail_levels[source]
        if there:
            floor = np.int64(floors[source])
            quality, state = take(states[np.uint64(turn & 7)], QUALITY, slots, packed)
            states[np.uint64(turn & 7)], cursor = refill(state, 0, words, cursor)
            turn += 1
            quality = min(quality, QUALITIES - 1)
            fours = (there + 3) >> 2
            scale = (8 << 16) // fours
            for four in range(fours):
                mask, state = take(
                    states[np.uint64(turn & 7)], STAYS + quality * 8 + ((four * scale) >> 16), slots, packed
                )
                states[np.uint64(turn & 7)], cursor = refill(state, 0, words, cursor)
                turn += 1
                for bit in range(4):
                    kept[np.uint64(stay)] = four * 4 + bit
                    stay += (mask >> bit) & 1
            if stay > count or (stay and kept[stay - 1] >= there):
                return 3
        shift = MOST_BACK
        if count:
            symbol, state = take(states[np.uint64(turn & 7)], FLOOR + (there > 0), slots, packed)
            bits = LEVEL_BITS if symbol == ESCAPE else 0
            before, floor = floor, (plain(state, bits) if symbol == ESCAPE else floor + symbol - MIDDLE)
            states[np.uint64(turn & 7)], cursor = refill(state, bits, words, cursor)
            turn += 1
            if floor < 0 or floor > lowest:
                return 4
            shift += np.int64(nats[floor]) - np.int64(nats[before])
        if tail > lowest:
            guess, context = tail << 16, ZERO_TAIL
        else:
            guess = np.int64(guesses[np.uint64(nats[tail] + shift)])
            context = TAIL + min((guess >> 10) & 0x3F, 5)
        symbol, state = take(states[np.uint64(turn & 7)], context, slots, packed)
        bits = LEVEL_BITS if symbol == ESCAPE else guess & 0xFF
        tail = plain(state, bits) + (0 if symbol == ESCAPE else (guess >> 16) + ((symbol - MIDDLE) << bits))
        states[np.uint64(turn & 7)], cursor = refill(state, bits, words, cursor)
        turn += 1
        if tail < 0 or tail > lowest + 1:
            return 5
        tail_levels[t] = tail
        tails[t] = values[tail]
        from_here = source * top_k
        for i in range(np.uint64(stay)):
            place = np.uint64(from_here + kept[i])
            row_ids[i] = flat_ids[place]
            plans[i] = guesses[np.uint64(heights[place] + shift)]
        for i in range(np.uint64(stay)):
            guess = np.int64(plans[i])
            symbol, state = take(states[np.uint64(turn & 7)], HIT + ((guess >> 8) & 0xFF), slots, packed)
            bits = guess & 0xFF
            level = (guess >> 16) + ((symbol - MIDDLE) << bits)
            if symbol == ESCAPE:
                bits, level = np.int64(LEVEL_BITS), np.int64(0)
            level += plain(state, bits)
            states[np.uint64(turn & 7)], cursor = refill(state, bits, words, cursor)
            turn += 1
            keys[i] = np.int32((level << 16) | np.int64(i))
        level, novel = floor, count - stay
        for i in range(np.uint64(novel)):
            symbol, state = take(states[np.uint64(turn & 7)], step_context(np.int64(i), novel), slots, packed)
            meaning = STEP_TABLE[np.uint64(symbol)]
            bits = meaning & 0xFF
            level -= (meaning >> 8) + plain(state, bits)
            states[np.uint64(turn & 7)], cursor = refill(state, bits, words, cursor)
            which, state = take_bucket(states[np.uint64((turn + 1) & 7)], id_slots, id_packed)
            meaning = id_places[which]
            bits = meaning & 0xFF
            token = plain(state, bits)
            states[np.uint64((turn + 1) & 7)], cursor = refill(state, bits, words, cursor)
            turn += 2
            number = np.uint64(stay) + i
            places[i] = token + (meaning >> 8)
            keys[number] = np.int32((level << 16) | np.int64(number))
        wrong = False
        for i in range(np.uint64(count)):
            wrong |= (keys[i] < 0) | (keys[i] >= no_key)
        for i in range(np.uint64(novel)):
            wrong |= places[i] >= limit
        if wrong or cursor > end:
            return 6
        for i in range(np.uint64(novel)):
            place = places[i]
            row_ids[np.uint64(stay) + i] = id_tokens[np.uint64(place)] if place < known else place - known
        rank_row(keys, count, ranks)
        here = np.uint64(t * top_k)
        for i in range(np.uint64(count)):
            place, level = here + np.uint64(ranks[i]), np.uint64(keys[i] >> 16)
            flat_ids[place] = row_ids[i]
            heights[place] = nats[level]
            flat_log_probs[place] = values[level]
        for r in range(count, top_k):
            ids[t, r] = 0
            log_probs[t, r] = -np.inf
        counts[t], floors[t] = count, floor
    for i in range(STATES):
        if states[i] != np.uint64(FIRST):
            return 7
    return 0 if cursor == end else 7
