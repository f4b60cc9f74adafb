"""Sparse teacher targets of one sample ↔ bytes. Pure: numpy and xxhash only.

Layout, little-endian: a header of 28 bytes (magic `XDLT`, version u16, width of an id in bytes u16, T u32, k u32,
vocabulary u32, xxh64 of header and payload u64), then ids [T, k] (uint16 up to a vocabulary of 65,536, else uint32),
log-probabilities float16 [T, k], log of the tail's mass float16 [T]. At k = 32 that is 130 bytes per token.

float16 keeps 11 significant bits: a log-probability l in [−65504, −2⁻¹⁴] comes back within |l|·2⁻¹¹, one nearer to zero
within 2⁻²⁵; −inf (an empty tail) is kept. Below −65504, where probability means nothing, it becomes −65504.
"""

import struct

import numpy as np
import xxhash
from numpy.typing import NDArray

VERSION = 1
MAGIC = b"XDLT"
_HEADER = struct.Struct("<4sHHIII")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
LOWEST = float(np.finfo(np.float16).min)


class CodecError(ValueError):
    """Targets that cannot be written, or bytes that are not targets as this version writes them."""


def encode(
    ids: NDArray[np.integer], log_probs: NDArray[np.floating], tail_log_mass: NDArray[np.floating], vocab_size: int
) -> bytes:
    """Pack the targets of T positions.

    Args:
        ids: [T, k], tokens, 0 ≤ id < vocab_size.
        log_probs: [T, k], ≤ 0, −inf allowed.
        tail_log_mass: [T], ≤ 0, −inf allowed.
        vocab_size: V.

    Raises:
        CodecError: shapes or values do not fit.
    """
    if ids.ndim != 2 or log_probs.shape != ids.shape or tail_log_mass.shape != ids.shape[:1]:
        raise CodecError(f"shapes {ids.shape}, {log_probs.shape}, {tail_log_mass.shape}: expected [T, k], [T, k], [T]")
    if not 0 < vocab_size < 1 << 32:
        raise CodecError(f"vocab_size {vocab_size}: expected 1 to {(1 << 32) - 1}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise CodecError(f"ids from {ids.min()} to {ids.max()}: expected 0 to {vocab_size - 1}")
    positions, top_k = ids.shape
    payload = ids.astype(_id_type(vocab_size)).tobytes() + _to_half(log_probs) + _to_half(tail_log_mass)
    header = _HEADER.pack(MAGIC, VERSION, _id_type(vocab_size).itemsize, positions, top_k, vocab_size)
    return header + _CHECKSUM.pack(xxhash.xxh64_intdigest(header + payload)) + payload


def decode(data: bytes) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """The targets in `data`: ids int32 [T, k], log-probabilities float32 [T, k], log of the tail's mass float32 [T].

    Raises:
        CodecError: not targets, of another version, cut short, or changed since they were written.
    """
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        raise CodecError(f"{len(data)} bytes that do not begin with the header of teacher targets")
    _, version, width, positions, top_k, vocab_size = _HEADER.unpack_from(data)
    if version != VERSION:
        raise CodecError(f"codec version {version}: this program reads {VERSION}")
    payload = memoryview(data)[HEADER_BYTES:]
    digest = xxhash.xxh64(data[: _HEADER.size])
    digest.update(payload)
    if digest.intdigest() != _CHECKSUM.unpack_from(data, _HEADER.size)[0]:
        raise CodecError("checksum differs: the bytes were damaged or cut short")
    id_type, count = _id_type(vocab_size), positions * top_k
    if width != id_type.itemsize or len(payload) != count * (width + 2) + positions * 2:
        raise CodecError(f"{len(payload)} bytes of payload do not fit T={positions}, k={top_k}, ids of {width} bytes")
    ids = np.frombuffer(payload, id_type, count).astype(np.int32).reshape(positions, top_k)
    halves = np.frombuffer(payload, "<f2", count + positions, count * width).astype(np.float32)
    return ids, halves[:count].reshape(positions, top_k), halves[count:]


def _id_type(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _to_half(log_values: NDArray[np.floating]) -> bytes:
    """float16 bytes; rejects what no probability has."""
    values = np.asarray(log_values, np.float32)
    if np.isnan(values).any() or (values > 1e-3).any():
        raise CodecError("log-probabilities above 0 or NaN")
    finite = np.where(np.isneginf(values), values, np.clip(values, LOWEST, 0.0))
    return finite.astype("<f2").tobytes()
