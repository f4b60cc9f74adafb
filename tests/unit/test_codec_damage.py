"""No damage to a sample or a prior goes unnoticed, and no forged one reaches memory that is not its own."""

import struct
import tracemalloc

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec import make

from xlstm_distill.data.codec import HEADER_BYTES, VERSION, CodecError, Prior, decode, encode, prior_of

TARGETS = make(20, 5, 500, 0)
PRIOR = Prior.fit([make(60, 5, 500, 1)], 500)


@pytest.mark.parametrize("prior", [None, PRIOR])
def test_every_byte_flipped_once_is_noticed(prior):
    data = encode(*TARGETS, 500, prior)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        with pytest.raises(CodecError):
            decode(bytes(damaged), prior)
        with pytest.raises(CodecError):
            prior_of(bytes(damaged))


def test_a_sample_tells_the_prior_that_it_was_written_with():
    assert prior_of(encode(*TARGETS, 500, PRIOR)) == PRIOR.digest
    assert prior_of(encode(*TARGETS, 500)) == ""


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_every_changed_byte_is_noticed(place, change):
    data = bytearray(encode(*TARGETS, 500, PRIOR))
    data[place % len(data)] ^= change
    with pytest.raises(CodecError):
        decode(bytes(data), PRIOR)


@given(st.integers(0, 200))
def test_bytes_cut_short_or_with_more_behind_are_refused(length):
    data = encode(*TARGETS, 500)
    with pytest.raises(CodecError):
        decode(data[: min(length, len(data) - 1)])
    with pytest.raises(CodecError):
        decode(data + b"x" * (length + 1))


def signed(data: bytearray) -> bytes:
    """`data` with the checksum that belongs to it."""
    digest = xxhash.xxh64(bytes(data[: HEADER_BYTES - 8]) + bytes(data[HEADER_BYTES:])).intdigest()
    data[HEADER_BYTES - 8 : HEADER_BYTES] = struct.pack("<Q", digest)
    return bytes(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([None, PRIOR]), st.booleans())
def test_a_forged_payload_with_the_right_checksum_is_refused_or_stays_in_its_bounds(seed, changes, prior, ragged):
    rng = np.random.default_rng(seed)
    ids, log_probs, tail = (x.copy() for x in TARGETS)
    if ragged:
        log_probs[::3, 3:] = -np.inf
    data = bytearray(encode(ids, log_probs, tail, 500, prior))
    for place in rng.integers(HEADER_BYTES, len(data), changes):
        data[place] = rng.integers(256)
    try:
        ids, log_probs, tail = decode(signed(data), prior)
    except CodecError:
        return
    assert ids.min() >= 0
    assert ids.max() < 500
    assert (log_probs <= 0).all()
    assert (tail <= 0).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(16, 400))
def test_random_words_with_the_right_checksum_are_refused(seed, words):
    data = bytearray(encode(*TARGETS, 500)[:HEADER_BYTES])
    data += np.random.default_rng(seed).bytes(4 * words)
    with pytest.raises(CodecError):
        decode(signed(data))


@pytest.mark.parametrize("place", [6, 8, 12, 16])
@pytest.mark.parametrize("value", [0, 1, 0x7FFF, 0xFFFF])
def test_a_forged_header_with_the_right_checksum_is_refused(place, value):
    data = bytearray(encode(*TARGETS, 500))
    data[place : place + 2] = struct.pack("<H", value)
    data[10:12] = struct.pack("<H", 0xFFFF) if place == 8 and value == 0xFFFF else data[10:12]
    with pytest.raises(CodecError):
        decode(signed(data))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("positions", "top_k"), [(1 << 28, 1), (1 << 20, 256), (1 << 13, 1 << 15), (40_000, 5)])
def test_a_forged_header_gets_no_more_memory_than_the_payload_could_fill(positions, top_k, ragged):
    ids, log_probs, tail = make(20, 5, 500, 0)
    log_probs[0, 4:] = -np.inf if ragged else log_probs[0, 4:]
    data = bytearray(encode(ids, log_probs, tail, 500))
    data[8:20] = struct.pack("<III", positions, top_k, 1 << 24)
    tracemalloc.start()
    with pytest.raises(CodecError, match="cannot hold"):
        decode(signed(data))
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_another_version_is_named():
    data = bytearray(encode(*TARGETS, 500))
    data[4] = VERSION + 1
    with pytest.raises(CodecError, match=f"version {VERSION + 1}: this program reads {VERSION}"):
        decode(bytes(data))


def test_another_prior_is_refused_with_both_named():
    other = Prior.fit([make(60, 5, 500, 2)], 500)
    data = encode(*TARGETS, 500, PRIOR)
    with pytest.raises(CodecError, match=f"written with the prior {PRIOR.digest}, but {other.digest} is given"):
        decode(data, other)
    with pytest.raises(CodecError, match=f"written with the prior {PRIOR.digest}, but none is given"):
        decode(data)
    with pytest.raises(CodecError, match=f"written with the prior none, but {PRIOR.digest} is given"):
        decode(encode(*TARGETS, 500), PRIOR)


@pytest.mark.parametrize(("top_k", "vocab_size"), [(4, 500), (5, 501)])
def test_a_prior_of_another_shape_is_refused_at_writing(top_k, vocab_size):
    with pytest.raises(CodecError, match=f"vocabulary {vocab_size} and k = {top_k}, but the prior was made for 500"):
        encode(*make(2, top_k, vocab_size, 0), vocab_size, PRIOR)


def test_a_prior_survives_its_way_through_bytes_and_makes_samples_smaller():
    again = Prior.from_bytes(PRIOR.to_bytes())
    assert again.digest == PRIOR.digest
    data = encode(*TARGETS, 500, PRIOR)
    assert all((a == b).all() for a, b in zip(decode(data, again), decode(data, PRIOR), strict=True))
    targets = make(300, 5, 500, 3)
    assert len(encode(*targets, 500, PRIOR)) < 0.95 * len(encode(*targets, 500))


def test_every_kind_of_damage_to_a_prior_is_noticed():
    data = PRIOR.to_bytes()
    for place in [*range(60), *range(60, len(data), 97), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        with pytest.raises(CodecError):
            Prior.from_bytes(bytes(damaged))
    for other in (b"", data[:-1], data + b"x", data[:30]):
        with pytest.raises(CodecError):
            Prior.from_bytes(other)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 10))
def test_a_forged_prior_with_the_right_checksum_is_refused_unless_it_is_sound(seed, changes):
    rng, data = np.random.default_rng(seed), bytearray(PRIOR.to_bytes())
    for place in rng.integers(6, len(data) - 8, changes):
        data[place] = rng.integers(256)
    data[-8:] = struct.pack("<Q", xxhash.xxh64_intdigest(bytes(data[:-8])))
    try:
        prior = Prior.from_bytes(bytes(data))
    except CodecError:
        return
    assert len(decode(encode(*TARGETS, 500, prior), prior)[0]) == 20


def test_a_prior_of_nothing_or_of_two_shapes_is_refused():
    for samples in ([], [make(0, 5, 500, 0)], [make(2, 5, 500, 0), make(2, 4, 500, 0)]):
        with pytest.raises(CodecError, match="rows of one k"):
            Prior.fit(samples, 500)
