"""A prior out of samples of targets: which ids are usual, which rows help others, how often each symbol comes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.data.events import CONTEXT, ID, ID_SLOT_BITS, SLOT_BITS, SYMBOLS, VALUE
from xlstm_distill.data.grid import CodecError
from xlstm_distill.data.prior import MOST_TOKENS, Prior, Targets, frequencies, rare_unit
from xlstm_distill.data.quantised import quantised
from xlstm_distill.data.rows import CONTEXTS
from xlstm_distill.data.rows_write import describe


def fit_prior(targets: Sequence[Targets], vocab_size: int) -> Prior:
    """See `Prior.fit`."""
    lengths = sorted({ids.shape[1] for ids, _, _ in targets})
    if len(lengths) != 1 or not any(len(ids) for ids, _, _ in targets):
        raise CodecError(f"a prior is made of rows of one k; found k = {lengths}")
    prior = Prior.flat(vocab_size, lengths[0])
    samples = [quantised(*sample, vocab_size, prior.grid) for sample in targets]
    tails = np.concatenate([s.tails for s in samples])
    floors = np.concatenate([s.levels[np.arange(len(s.ids)), np.maximum(s.counts, 1) - 1] for s in samples])
    floors = np.minimum(floors, len(prior.grid.nats) - 1)
    prior = replace(prior, typical=np.array([np.median(floors), np.median(tails)], np.int64))
    symbols, tokens = np.zeros(CONTEXTS * SYMBOLS, np.int64), np.zeros(prior.vocab_size, np.int64)
    for sample in samples:
        events = describe(*sample, 0, *prior.for_rows)
        symbols += np.bincount(_symbols(events), minlength=len(symbols))
        tokens += np.bincount((events[events >= ID].astype(np.int64) >> VALUE) & 0xFFFFFF, minlength=len(tokens))
    weights = symbols.reshape(CONTEXTS, SYMBOLS) + 8 * prior.frequency / (1 << SLOT_BITS)
    id_frequency, id_bits, known = buckets(tokens)
    return replace(
        prior,
        frequency=frequencies(weights, 1 << SLOT_BITS),
        id_frequency=id_frequency,
        id_bits=id_bits,
        tokens=known,
    )


def _symbols(events: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Context · SYMBOLS + symbol of the events that are symbols."""
    found = events[events < ID].astype(np.int64)
    return ((found >> CONTEXT) & 0xFF) * SYMBOLS + (found & 0xFF)


def buckets(counts: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.int32]]:
    """Ids by falling count in buckets of 2^n ids, each worth a few slots, and a last one for all other ids.

    Args:
        counts: [V].

    Returns:
        Frequency [B] and log2 of size [B] of the buckets, and the ids of all but the last.
    """
    known = np.flatnonzero(counts)
    known = known[np.argsort(-counts[known], kind="stable")][:MOST_TOKENS]
    total, sizes, place = max(int(counts.sum()), 1), [], 0
    while place < len(known):
        bits = 0
        aim = 4 * total >> ID_SLOT_BITS
        while counts[known[place : place + (1 << bits)]].sum() < aim and bits < 12:
            bits += 1
        if place + (1 << bits) > len(known):
            break
        sizes.append(bits)
        place += 1 << bits
    known = known[:place]
    ends = np.cumsum(1 << np.array(sizes, np.int64)) if sizes else np.zeros(0, np.int64)
    sums = np.diff(np.append(0, np.append(0, np.cumsum(counts[known]))[ends]))
    rare = max(int(counts.sum() - sums.sum()), 0) + np.count_nonzero(counts == 1)
    bits = (len(counts) - 1).bit_length()
    unit, all_slots = rare_unit(bits), 1 << ID_SLOT_BITS
    share = frequencies(np.append(sums, rare + 1.0)[None], all_slots)[0, -1]
    last = min(-(-int(share) // unit), (all_slots - len(sizes)) // unit) * unit
    frequency = frequencies(sums[None].astype(np.float64), all_slots - last)[0] if sizes else []
    return np.append(frequency, last).astype(np.uint16), np.array([*sizes, bits], np.uint8), known.astype(np.int32)
