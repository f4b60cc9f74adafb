"""Sparse targets survive the way through bytes within the stated bound, and no damage goes unnoticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_distill.data.codec import HEADER_BYTES, VERSION, CodecError, decode, encode


def make(positions: int, top_k: int, vocab_size: int, seed: int, scale: float = 5.0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, (positions, top_k))
    log_probs = -np.abs(rng.normal(0, scale, (positions, top_k))).astype(np.float32)
    tail = -np.abs(rng.normal(0, scale, positions)).astype(np.float32)
    log_probs[rng.random(log_probs.shape) < 0.1] = -np.inf
    tail[rng.random(positions) < 0.2] = -np.inf
    return ids, log_probs, tail


def within_bound(found: np.ndarray, wanted: np.ndarray) -> bool:
    finite = np.isfinite(wanted)
    allowed = np.maximum(np.abs(wanted[finite]) * 2.0**-11, 2.0**-25)
    return bool(
        (np.isneginf(found) == np.isneginf(wanted)).all() and (np.abs(found[finite] - wanted[finite]) <= allowed).all()
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 9), st.sampled_from([1, 50, 65_536, 65_537, 151_936]), st.integers(0, 99),
    st.sampled_from([1e-6, 1e-3, 1.0, 20.0, 9000.0]),
)  # fmt: skip
def test_ids_come_back_exactly_and_log_probabilities_within_the_stated_bound(positions, top_k, vocab_size, seed, scale):
    ids, log_probs, tail = make(positions, top_k, vocab_size, seed, scale)
    found_ids, found_log_probs, found_tail = decode(encode(ids, log_probs, tail, vocab_size))
    assert found_ids.dtype == np.int32
    assert found_log_probs.dtype == found_tail.dtype == np.float32
    assert (found_ids == ids).all()
    assert within_bound(found_log_probs, log_probs)
    assert within_bound(found_tail, tail)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255), st.sampled_from([40_000, 100_000]))
def test_every_changed_byte_is_noticed(place, change, vocab_size):
    data = bytearray(encode(*make(5, 3, vocab_size, 0), vocab_size))
    data[place % len(data)] ^= change
    with pytest.raises(CodecError):
        decode(bytes(data))


@given(st.integers(0, 200))
def test_bytes_cut_short_or_with_more_behind_are_refused(length):
    data = encode(*make(5, 3, 100, 0), 100)
    with pytest.raises(CodecError):
        decode(data[: min(length, len(data) - 1)])
    with pytest.raises(CodecError):
        decode(data + b"x" * (length + 1))


def test_a_token_costs_four_bytes_per_kept_token_and_two_for_the_tail_below_65537_tokens():
    assert len(encode(*make(512, 32, 49_152, 0), 49_152)) == HEADER_BYTES + 512 * (32 * 4 + 2)
    assert len(encode(*make(512, 32, 151_936, 0), 151_936)) == HEADER_BYTES + 512 * (32 * 6 + 2)


def test_a_probability_of_one_and_an_empty_tail_are_exact():
    ids, log_probs, tail = decode(encode(np.array([[7]]), np.array([[0.0]]), np.array([-np.inf]), 8))
    assert (ids[0, 0], log_probs[0, 0], tail[0]) == (7, 0.0, -np.inf)


def test_what_float16_cannot_hold_becomes_its_lowest_number_and_not_minus_infinity():
    _, log_probs, _ = decode(encode(np.array([[0]]), np.array([[-1e6]]), np.array([-1.0]), 8))
    assert log_probs[0, 0] == np.finfo(np.float16).min


def test_another_version_is_named():
    data = bytearray(encode(*make(2, 2, 10, 0), 10))
    data[4] = VERSION + 1
    with pytest.raises(CodecError, match=f"version {VERSION + 1}: this program reads {VERSION}"):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("ids", "log_probs", "tail", "vocab_size", "message"),
    [
        ([[1, 2]], [[-1.0]], [-1.0], 10, "shapes"),
        ([[1]], [[-1.0]], [-1.0, -1.0], 10, "shapes"),
        ([[10]], [[-1.0]], [-1.0], 10, "expected 0 to 9"),
        ([[-1]], [[-1.0]], [-1.0], 10, "expected 0 to 9"),
        ([[1]], [[np.nan]], [-1.0], 10, "NaN"),
        ([[1]], [[0.5]], [-1.0], 10, "above 0"),
        ([[1]], [[-1.0]], [np.inf], 10, "above 0"),
        ([[1]], [[-1.0]], [-1.0], 0, "vocab_size 0"),
    ],
)
def test_what_are_no_targets_is_refused(ids, log_probs, tail, vocab_size, message):
    with pytest.raises(CodecError, match=message):
        encode(np.array(ids), np.array(log_probs), np.array(tail), vocab_size)
