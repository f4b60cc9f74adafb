"""Sparse teacher targets of one sample ↔ bytes. Pure: numpy, xxhash and, from the first call, numba only.

A sample is decoded on its own, with the prior that it was written with (`prior.py`: shared by all samples of a teacher,
one small file) or, where it was written without one, by itself. Each row is coded as a change of an earlier row of the
sample that it resembles (`rows.py`), by range ANS (`rans.py`).

Layout, little-endian: magic `XDLT`, version u16, steps u16 (highest bit: rows differ in length), T u32, k u32,
vocabulary u32, digest of the prior u64 (0: none), xxh64 of all other bytes u64; then words u32 of the coder.

What comes back:
- ids exactly, as a set with their values: in order of falling log-probability, in any order among equal ones;
- log-probabilities and tail within the bound of `grid.py`, probability zero exactly. The sum of a row is 1 only within
  that bound: normalise over k + 1;
- where a row has entries of log-probability −inf (padding), they stand at its end with id 0.

Damage of any kind is noticed, by the checksum. Bytes that were forged with a right checksum are refused or give ids and
values in range, in no more memory than targets of their length can take; only there may an id stand twice in a row.
"""

import struct
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from xlstm_distill.data.events import STATES
from xlstm_distill.data.grid import CodecError
from xlstm_distill.data.prior import Prior

__all__ = ["HEADER_BYTES", "VERSION", "CodecError", "Prior", "decode", "encode", "prior_of"]

VERSION = 2
MAGIC = b"XDLT"
_HEADER = struct.Struct("<4sHHIIIQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_RAGGED = 1 << 15
MOST_ENTRIES = 1 << 28
"""Largest T · k."""
_SYMBOLS_PER_WORD = 350
"""More no word can hold: a symbol has at most 961 of 1024 slots, so it takes at least 0.0916 bits."""


def encode(
    ids: NDArray[np.integer],
    log_probs: NDArray[np.floating],
    tail_log_mass: NDArray[np.floating],
    vocab_size: int,
    prior: Prior | None = None,
) -> bytes:
    """Pack the targets of T positions.

    Args:
        ids: [T, k], tokens, 0 ≤ id < vocab_size, all different in a row; where the log-probability is −inf, anything.
        log_probs: [T, k], ≤ 0, −inf allowed; written fastest where they fall along a row.
        tail_log_mass: [T], ≤ 0, −inf allowed.
        vocab_size: V, at most 2^24.
        prior: made for this V and k; None: bytes that need none, a quarter more of them.

    Raises:
        CodecError: shapes or values do not fit.
    """
    from xlstm_distill.data.quantised import quantised  # here, since numba takes its time to import
    from xlstm_distill.data.rans import write
    from xlstm_distill.data.rows_write import describe

    top_k = ids.shape[1] if ids.ndim == 2 else 1
    used = prior or Prior.flat(vocab_size, top_k)
    if (used.vocab_size, used.top_k) != (vocab_size, top_k):
        raise CodecError(
            f"vocabulary {vocab_size} and k = {top_k}, but the prior was made for {used.vocab_size} and {used.top_k}"
        )
    if ids.size > MOST_ENTRIES:
        raise CodecError(f"{ids.shape} targets: expected at most {MOST_ENTRIES} in a sample")
    rows = quantised(ids, log_probs, tail_log_mass, vocab_size, used.grid)
    ragged = bool((rows.counts < top_k).any())
    events = describe(*rows, top_k.bit_length() if ragged else 0, *used.for_rows)
    payload = write(events, *used.for_write).astype("<u4").tobytes()
    steps = used.steps | (_RAGGED if ragged else 0)
    digest = int(prior.digest, 16) if prior else 0
    header = _HEADER.pack(MAGIC, VERSION, steps, len(ids), top_k, vocab_size, digest)
    return header + _CHECKSUM.pack(xxhash.xxh64_intdigest(header + payload)) + payload


def decode(
    data: bytes, prior: Prior | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """The targets in `data`: ids int32 [T, k], log-probabilities float32 [T, k], log of the tail's mass float32 [T].

    Args:
        data: what `encode` made.
        prior: the one that `encode` had.

    Raises:
        CodecError: not targets, of another version or prior, cut short, or changed since they were written.
    """
    from xlstm_distill.data.rows_read import read, spare_words

    steps, positions, top_k, vocab_size, digest = _header(data)
    if digest != (prior.digest if prior else _NO_PRIOR):
        raise CodecError(f"written with the prior {digest}, but {prior.digest if prior else _NO_PRIOR} is given")
    used = prior or Prior.flat(vocab_size, top_k, steps & ~_RAGGED)
    if (used.vocab_size, used.top_k, used.steps) != (vocab_size, top_k, steps & ~_RAGGED):
        raise CodecError("the header contradicts the prior")
    count = (len(data) - HEADER_BYTES) // 4
    ragged = top_k.bit_length() if steps & _RAGGED else 0
    # Each row takes at least two symbols, and one for each entry; or its length, which may be 0, in plain bits.
    least = positions * (3 + 10 * ragged if ragged else 2 + top_k)
    if count < 2 * STATES or least > count * _SYMBOLS_PER_WORD or positions * top_k > MOST_ENTRIES:
        raise CodecError(f"{len(data)} bytes cannot hold T={positions}, k={top_k}")
    words = np.zeros(count + spare_words(top_k), np.uint32)
    words[:count] = np.frombuffer(data, "<u4", count, HEADER_BYTES)
    ids, log_probs = np.empty((positions, top_k), np.int32), np.empty((positions, top_k), np.float32)
    tails = np.empty(positions, np.float32)
    arguments: tuple[Any, ...] = (words, ragged, *used.for_read, vocab_size, ids, log_probs, tails)
    fault = read(*arguments)
    if fault:
        raise CodecError(f"the payload contradicts itself (fault {fault})")
    return ids, log_probs, tails


_NO_PRIOR = "none"


def prior_of(data: bytes) -> str:
    """Digest of the prior that `data` was written with; empty where that was none.

    Raises:
        CodecError: not targets, of another version, cut short, or changed since they were written.
    """
    digest = str(_header(data)[-1])
    return "" if digest == _NO_PRIOR else digest


def _header(data: bytes) -> tuple[Any, ...]:
    """Steps, T, k, V and digest of the prior of a sample whose checksum is right."""
    if len(data) < HEADER_BYTES or bytes(data[:4]) != MAGIC:
        raise CodecError(f"{len(data)} bytes that do not begin with the header of teacher targets")
    _, version, steps, positions, top_k, vocab_size, digest = _HEADER.unpack_from(data)
    if version != VERSION:
        raise CodecError(f"codec version {version}: this program reads {VERSION}")
    checksum = xxhash.xxh64(data[: _HEADER.size])
    checksum.update(memoryview(data)[HEADER_BYTES:])
    if checksum.intdigest() != _CHECKSUM.unpack_from(data, _HEADER.size)[0] or len(data) % 4:
        raise CodecError("checksum differs: the bytes were damaged or cut short")
    return steps, positions, top_k, vocab_size, f"{digest:016x}" if digest else _NO_PRIOR
