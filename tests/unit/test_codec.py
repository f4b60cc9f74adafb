"""Sparse targets survive the way through bytes within the stated bound, whatever they look like."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_distill.data.codec import CodecError, Prior, decode, encode
from xlstm_distill.data.events import BITS, CONTEXT, FIRST, SLOT_BITS, STATES, SYMBOLS, VALUE
from xlstm_distill.data.grid import LOWEST_NATS, default_steps
from xlstm_distill.data.rans import plain, refill, take, write
from xlstm_distill.data.rows import REFERENCE
from xlstm_distill.data.rows_write import FARTHEST, HASH_BITS, _most_alike


def make(positions: int, top_k: int, vocab_size: int, seed: int, scale: float = 2.0):
    """Rows of different ids by falling log-probability, with sums below 1; neighbours share ids."""
    rng = np.random.default_rng(seed)
    pool = min(vocab_size, 3 * top_k)
    ids = np.array([rng.permutation(pool)[:top_k] for _ in range(positions)]).reshape(positions, top_k)
    ids = (ids * (vocab_size // pool)) % vocab_size
    logits = -np.sort(rng.exponential(scale, (positions, top_k + 1)).cumsum(1)[:, ::-1], axis=1)[:, ::-1]
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return ids, logits[:, :-1].astype(np.float32), logits[:, -1].astype(np.float32)


def by_id(ids, log_probs):
    """Rows in order of their ids, those of probability zero left out."""
    return [
        sorted((int(token), float(value)) for token, value in zip(row, values, strict=True) if value > -np.inf)
        for row, values in zip(ids, log_probs, strict=True)
    ]


def within_bound(found, wanted, steps: int) -> bool:
    """The bound of grid.py."""
    found, wanted = np.asarray(found, np.float64), np.maximum(np.asarray(wanted, np.float64), -1e30)
    lowest = -LOWEST_NATS
    bound = np.minimum(1.1 / (steps * np.exp(np.maximum(wanted, lowest) / 2)), 0.25) + 1e-6
    near = np.abs(found - np.maximum(wanted, lowest)) <= bound + (wanted < lowest + 1)
    return bool(np.where(wanted == -1e30, found == -np.inf, near).all())


def check(targets, vocab_size: int, prior: Prior | None = None) -> None:
    found = decode(encode(*targets, vocab_size, prior), prior)
    ids, log_probs, tail = found
    assert (ids.dtype, log_probs.dtype, tail.dtype) == (np.int32, np.float32, np.float32)
    assert ids.shape == log_probs.shape == targets[0].shape
    ours, theirs = by_id(ids, log_probs), by_id(targets[0], targets[1])
    assert [[token for token, _ in row] for row in ours] == [[token for token, _ in row] for row in theirs]
    flat = [[value for row in rows for _, value in row] for rows in (ours, theirs)]
    steps = prior.steps if prior else default_steps(ids.shape[1])
    assert within_bound(*flat, steps)
    assert within_bound(tail, targets[2], steps)
    assert (log_probs[:, 1:] <= log_probs[:, :-1]).all()
    assert (ids[np.isneginf(log_probs)] == 0).all()


SHAPES = [(1, 1), (1, 7), (5, 50), (32, 50), (33, 65_536), (40, 65_537), (7, 1 << 24)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12), st.sampled_from(SHAPES), st.integers(0, 99), st.sampled_from([1e-6, 0.01, 0.3, 3.0, 40.0]),
    st.sampled_from([np.float16, np.float32, np.float64]), st.booleans(),
)  # fmt: skip
def test_ids_come_back_exactly_and_log_probabilities_within_the_stated_bound(
    positions, shape, seed, scale, dtype, shuffled
):
    ids, log_probs, tail = make(positions, *shape, seed, scale)
    with np.errstate(over="ignore"):
        log_probs, tail = log_probs.astype(dtype), tail.astype(dtype)
    if shuffled:
        order = np.random.default_rng(seed).permutation(ids.shape[1])
        ids, log_probs = ids[:, order], log_probs[:, order]
    check((ids, log_probs, tail), shape[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 30), st.integers(0, 99))
def test_counts_of_samples_with_padding_and_no_tail_come_back(positions, draws, seed):
    rng = np.random.default_rng(seed)
    top_k, vocab_size = 20, 300
    ids = np.full((positions, top_k), vocab_size + 5)  # what stands in padding is nobody's business
    log_probs = np.full((positions, top_k), -np.inf)
    for row in range(positions):
        tokens, counts = np.unique(rng.integers(0, 15, rng.integers(0, draws + 1)) * 19, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        ids[row, : len(tokens)] = tokens[order]
        log_probs[row, : len(tokens)] = np.log(counts[order] / max(counts.sum(), 1))
    check((ids, log_probs, np.full(positions, -np.inf)), vocab_size)


@pytest.mark.parametrize("prior", [False, True])
def test_no_rows_one_row_all_of_the_vocabulary_and_nothing_at_all_come_back(prior):
    for positions, top_k, vocab_size in [(0, 3, 9), (1, 3, 9), (40, 9, 9), (3, 1, 1)]:
        targets = make(positions, top_k, vocab_size, 0)
        check(targets, vocab_size, Prior.fit([make(20, top_k, vocab_size, 1)], vocab_size) if prior else None)
    nothing = np.zeros((4, 3), np.int64), np.full((4, 3), -np.inf), np.full(4, -np.inf)
    check(nothing, 9, Prior.fit([nothing], 9) if prior else None)


@pytest.mark.parametrize("vocab_size", [1 << 17, 1 << 18, (1 << 18) + 1, (1 << 18) + 64, 1 << 20, 1 << 24])
@pytest.mark.parametrize("rare", [0.0, 0.02, 1.0])
def test_rare_ids_of_wide_vocabularies_come_back_with_a_prior_that_hardly_expects_them(vocab_size, rare):
    rng = np.random.default_rng(0)

    def rows(positions: int, rare: float):
        ids, log_probs, tail = make(positions, 8, 400, 0)
        ids = np.where(rng.random(ids.shape) < rare, rng.integers(400, vocab_size, ids.shape), ids)
        once = [len(set(row)) == 8 for row in ids]
        return ids[once], log_probs[once], tail[once]

    prior = Prior.from_bytes(Prior.fit([rows(200, rare)], vocab_size).to_bytes())
    for _ in range(20):
        check(rows(30, 0.1), vocab_size, prior)


def test_a_prior_under_which_rare_ids_could_not_be_read_back_is_refused():
    prior = Prior.fit([make(50, 8, 1 << 20, 0)], 1 << 20)
    frequency = prior.id_frequency.copy()
    frequency[-1] += 1
    frequency[frequency.argmax()] -= 1
    with pytest.raises(CodecError, match="contradicts itself"):
        Prior.from_bytes(replace(prior, id_frequency=frequency).to_bytes())


def test_rows_longer_than_are_ranked_by_counting_come_back():
    check(make(3, 700, 5000, 0, 0.01), 5000)


def test_probability_one_and_zero_are_exact_and_what_is_lower_than_the_lowest_is_not_zero():
    ids, log_probs, tail = decode(encode(np.array([[7, 3]]), np.array([[0.0, -1e6]]), np.array([-np.inf]), 8))
    assert (ids[0, 0], log_probs[0, 0], tail[0]) == (7, 0.0, -np.inf)
    assert -LOWEST_NATS - 1 < log_probs[0, 1] < -LOWEST_NATS + 1


def divergence(wanted, found) -> float:
    rows = [np.concatenate([x[1], x[2][:, None]], 1).astype(np.float64) for x in (wanted, found)]
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in rows)
    return float((np.exp(p) * (p - q)).sum(1).mean())


@pytest.mark.parametrize("top_k", [8, 32, 64, 256])
def test_rows_like_those_of_a_model_lose_less_than_a_ten_thousandth_of_a_nat(top_k):
    rng = np.random.default_rng(0)
    logits = 2.5 * rng.standard_normal((300, 4000)) * rng.uniform(0.3, 2, (300, 1))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-log_probs, axis=1)
    log_probs = np.take_along_axis(log_probs, ids, 1)
    tail = np.log(np.exp(log_probs[:, top_k:]).sum(1))
    targets = ids[:, :top_k], log_probs[:, :top_k], tail
    found = decode(encode(*targets, 4000))
    order = [np.argsort(ids, axis=1) for ids in (targets[0], found[0])]
    wanted, got = ((None, np.take_along_axis(x[1], o, 1), x[2]) for x, o in zip((targets, found), order, strict=True))
    assert divergence(wanted, got) < 1e-4


@pytest.mark.parametrize(
    ("ids", "log_probs", "tail", "vocab_size", "message"),
    [
        ([[1, 2]], [[-1.0]], [-1.0], 10, "shapes"),
        ([[1]], [[-1.0]], [-1.0, -1.0], 10, "shapes"),
        ([1], [-1.0], [-1.0], 10, "shapes"),
        ([[10]], [[-1.0]], [-1.0], 10, "row 0: id 10 expected 0 to 9"),
        ([[-1]], [[-1.0]], [-1.0], 10, "row 0: id -1 expected 0 to 9"),
        ([[3, 3]], [[-1.0, -2.0]], [-1.0], 10, "row 0: id 3 stands twice"),
        ([[1]], [[np.nan]], [-1.0], 10, "NaN"),
        ([[1]], [[0.5]], [-1.0], 10, "above 0"),
        ([[1]], [[-1.0]], [np.inf], 10, "above 0"),
        ([[1]], [[-1.0]], [-1.0], 0, "vocab_size 0"),
        ([[1]], [[-1.0]], [-1.0], (1 << 24) + 1, "vocab_size"),
        ([[0, 1, 2]], [[-1.0, -2.0, -3.0]], [-1.0], 2, "k = 3: expected 1 to 2"),
        (np.zeros((1, 0)), np.zeros((1, 0)), [-1.0], 2, "k = 0"),
    ],
)
def test_what_are_no_targets_is_refused(ids, log_probs, tail, vocab_size, message):
    with pytest.raises(CodecError, match=message):
        encode(np.array(ids), np.array(log_probs), np.array(tail), vocab_size)


def test_a_row_is_referred_to_only_from_less_than_the_farthest_distance():
    counts, hashes = np.full(4, 8, np.int32), np.arange(8, dtype=np.int32)[None].repeat(4, 0)
    for distance, found in ((FARTHEST - 1, 3), (FARTHEST, -1)):
        alike = np.full(1 << HASH_BITS, 3 + distance, np.int32)
        assert _most_alike(3 + distance, np.array([3, -1, -1]), counts, hashes, alike) == found


def test_the_farthest_reference_comes_back_however_rare_the_prior_takes_it_to_be():
    """One slot and 21 plain bits: the most that a state bears."""
    prior, bits = Prior.flat(1000, 8), (FARTHEST - 1).bit_length() - 1
    frequency = prior.frequency.copy()
    frequency[REFERENCE] = 1
    frequency[REFERENCE, 0] = (1 << SLOT_BITS) - SYMBOLS + 1
    prior, distances = replace(prior, frequency=frequency), np.random.default_rng(0).integers(0, 1 << bits, 2000)
    events = (1 + bits) | (REFERENCE << CONTEXT) | (bits << BITS) | (distances << VALUE)
    words = write(events.astype(np.uint64), *prior.for_write)
    states = [int(low) | int(high) << 32 for low, high in words[: 2 * STATES].reshape(-1, 2)]
    states, cursor, found = [np.uint64(state) for state in states], np.uint64(2 * STATES), []
    slots, packed, *_ = prior.for_read
    words = np.append(words, np.uint32(0))
    for turn in range(len(distances)):
        symbol, state = take.py_func(states[turn % STATES], REFERENCE, slots, packed)
        found.append((symbol, plain.py_func(state, bits)))
        states[turn % STATES], cursor = refill.py_func(state, bits, words, cursor)
    assert found == [(1 + bits, distance) for distance in distances]
    assert (cursor, set(states)) == (len(words) - 1, {FIRST})
