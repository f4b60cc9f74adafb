"""The entropy coder of sparse targets: events ↔ words. Compiled by numba.

An event is a symbol under a context with some plain bits behind it, or an id. Events are coded by range ANS (Duda,
arXiv 1311.2540): `STATES` states of 64 bits in turn, so that their chains of dependent operations overlap, over one
stream of 32-bit words. Reading has no branches that depend on the data: those would cost more than all the rest.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from xlstm_distill.data.compiled import kernel
from xlstm_distill.data.events import BITS, CONTEXT, FIRST, ID, ID_SLOT_BITS, SLOT_BITS, STATES, SYMBOLS, VALUE

Whole = int | np.int64
"""A number as kernels pass it."""


@kernel()
def write(
    events: NDArray[np.uint64],
    frequency: NDArray[np.uint16],
    start: NDArray[np.uint16],
    bucket_of: NDArray[np.int32],
    offset_of: NDArray[np.int32],
    bucket_frequency: NDArray[np.uint16],
    bucket_start: NDArray[np.uint16],
    bucket_bits: NDArray[np.uint8],
) -> NDArray[np.uint32]:
    """Words of the events: the states, then what they spilled in the order in which the decoder takes it back."""
    states = np.full(STATES, FIRST, np.uint64)
    words = np.empty(len(events) + 2 * STATES, np.uint32)
    place = len(words)
    for number in range(len(events) - 1, -1, -1):
        event = np.int64(events[number])
        value = (event >> VALUE) & 0xFFFFFF
        if event & ID:
            bucket = np.int64(bucket_of[value])
            value, bits, slot_bits = np.int64(offset_of[value]), np.int64(bucket_bits[bucket]), ID_SLOT_BITS
            first, share = np.int64(bucket_start[bucket]), np.int64(bucket_frequency[bucket])
        else:
            context, symbol = (event >> CONTEXT) & 0xFF, event & 0xFF
            bits, slot_bits = (event >> BITS) & 0xFF, SLOT_BITS
            first, share = np.int64(start[context, symbol]), np.int64(frequency[context, symbol])
        state = states[number & (STATES - 1)]
        if state >= np.uint64(share) << np.uint64(63 - slot_bits - bits):
            place -= 1
            words[place] = np.uint32(state & np.uint64(0xFFFFFFFF))
            state >>= np.uint64(32)
        state = (state << np.uint64(bits)) | np.uint64(value)
        quotient = state // np.uint64(share)
        rest = state - quotient * np.uint64(share)
        states[number & (STATES - 1)] = (quotient << np.uint64(slot_bits)) + np.uint64(first) + rest
    for number in range(STATES - 1, -1, -1):
        place -= 2
        words[place] = np.uint32(states[number] & np.uint64(0xFFFFFFFF))
        words[place + 1] = np.uint32(states[number] >> np.uint64(32))
    return words[place:]


# What indexes an array is unsigned below: a signed index costs a comparison, since Python's may count from the end.


@njit(inline="always")
def take(
    state: np.uint64, context: Whole, slots: NDArray[np.uint8], packed: NDArray[np.uint32]
) -> tuple[np.int64, np.uint64]:
    """The symbol of an event under `context`, and the state without it."""
    slot = state & np.uint64((1 << SLOT_BITS) - 1)
    symbol = np.uint64(slots[np.uint64(context << SLOT_BITS) | slot])
    pair = np.uint64(packed[np.uint64(context * SYMBOLS) | symbol])
    return np.int64(symbol), (pair >> np.uint64(16)) * (state >> np.uint64(SLOT_BITS)) + slot - (
        pair & np.uint64(0xFFFF)
    )


@njit(inline="always")
def take_bucket(state: np.uint64, slots: NDArray[np.uint16], packed: NDArray[np.uint32]) -> tuple[np.uint64, np.uint64]:
    """The bucket of an id, and the state without it."""
    slot = state & np.uint64((1 << ID_SLOT_BITS) - 1)
    bucket = np.uint64(slots[slot])
    pair = np.uint64(packed[bucket])
    return bucket, (pair >> np.uint64(16)) * (state >> np.uint64(ID_SLOT_BITS)) + slot - (pair & np.uint64(0xFFFF))


@njit(inline="always")
def plain(state: np.uint64, bits: Whole) -> np.int64:
    """Value of so many plain bits."""
    return np.int64(state & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)))


@njit(inline="always")
def refill(state: np.uint64, bits: Whole, words: NDArray[np.uint32], cursor: np.uint64) -> tuple[np.uint64, np.uint64]:
    """The state without its plain bits, with the next word where it has become small; the place of the word to come."""
    state = state >> np.uint64(bits)
    small = state < np.uint64(FIRST)
    filled = (state << np.uint64(32)) | np.uint64(words[cursor])
    return (filled if small else state), cursor + np.uint64(small)
