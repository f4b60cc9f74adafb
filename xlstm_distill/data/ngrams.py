"""The loops of `overlap.py` over bytes and hashes. Compiled by numba."""

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.data.compiled import kernel
from xlstm_distill.data.overlap import WORDS

MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd: of the polynomial over the hashes of n words."""
OLDEST = pow(MULTIPLIER, WORDS, 1 << 64)
"""What a word has been multiplied by when it leaves the n-gram."""
PRIME, BASIS = 0x100000001B3, 0xCBF29CE484222325
"""Of the hash of a word (FNV-1a)."""


@kernel()
def grams(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The hash of each n-gram of a text in UTF-8, in their order."""
    out, last = np.empty(len(data) // 2 + 1, np.uint64), np.zeros(WORDS, np.uint64)
    oldest, multiplier, prime, shift = np.uint64(OLDEST), np.uint64(MULTIPLIER), np.uint64(PRIME), np.uint64(32)
    words, count, word, gram, inside, place, skip = 0, 0, np.uint64(BASIS), np.uint64(0), False, 0, 0
    for i in range(len(data) + 1):
        letter = data[i] if i < len(data) else 32
        if 65 <= letter <= 90:
            letter += 32
        if letter == 0xE2 and i + 2 < len(data) and data[i + 1] == 0x80:
            skip = 3  # typographic quotes, dashes and spaces, U+2000 to U+203F
        skip -= 1
        if skip < 0 and (97 <= letter <= 122 or 48 <= letter <= 57 or letter >= 128):
            word = (word ^ np.uint64(letter)) * prime
            inside = True
        elif inside:
            word = (word ^ (word >> shift)) * multiplier
            word ^= word >> shift
            gram = gram * multiplier + word - oldest * last[place]
            last[place] = word
            place = place + 1 if place + 1 < WORDS else 0
            words += 1
            if words >= WORDS:
                out[count] = gram
                count += 1
            word, inside = np.uint64(BASIS), False
    return out[:count]


@kernel()
def fill(
    hashes: NDArray[np.uint64], sets: NDArray[np.int16], keys: NDArray[np.uint64], values: NDArray[np.int16]
) -> None:
    """Put each hash with its set into the open-addressing table: 2^n keys, and values, −1 where nothing stands."""
    mask = np.uint64(len(keys) - 1)
    for i in range(len(hashes)):
        slot = (hashes[i] ^ (hashes[i] >> np.uint64(32))) & mask
        while values[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        keys[slot], values[slot] = hashes[i], sets[i]


@kernel()
def look(
    data: NDArray[np.uint8], keys: NDArray[np.uint64], values: NDArray[np.int16], found: NDArray[np.bool_]
) -> None:
    """Mark the sets in the table that hold an n-gram of the text."""
    mask = np.uint64(len(keys) - 1)
    for gram in grams(data):
        slot = (gram ^ (gram >> np.uint64(32))) & mask
        while values[slot] >= 0:
            if keys[slot] == gram:
                found[values[slot]] = True
                break
            slot = (slot + np.uint64(1)) & mask
