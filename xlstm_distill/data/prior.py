"""What all samples of one teacher share, so that no sample has to carry it: frequencies, usual ids, usual rows."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from xlstm_distill.data.events import ID_SLOT_BITS, SLOT_BITS, SYMBOLS
from xlstm_distill.data.grid import FEWEST_STEPS, MOST_STEPS, CodecError, Grid, default_steps, grid
from xlstm_distill.data.rows import (
    CONTEXTS,
    FLOOR,
    HIT,
    LENGTH,
    MOST_BACK,
    NATS,
    OCTAVES,
    QUALITIES,
    QUALITY,
    REFERENCE,
    STAYS,
    STEP,
)

Targets = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""ids [T, k], log-probabilities [T, k], log of the tail's mass [T]."""
MAGIC = b"XDLP"
VERSION = 1
_HEADER = struct.Struct("<4sHHIHHIIHH")
_CHECKSUM = struct.Struct("<Q")
MOST_VOCABULARY = 1 << 24
MOST_KEPT = (1 << 16) - 1
"""Largest k."""
MOST_TOKENS = 1 << 16
"""Ids that the prior knows by frequency; the others are written plainly."""


@dataclass(frozen=True)
class Prior:
    """Made by `fit`, `flat` or `from_bytes`."""

    vocab_size: int
    top_k: int
    steps: int
    """Fineness of the levels (`grid.py`)."""
    typical: NDArray[np.int64]
    """[2], floor and tail of a row without reference."""
    frequency: NDArray[np.uint16]
    """[CONTEXTS, SYMBOLS], each row sums to 2^SLOT_BITS."""
    id_frequency: NDArray[np.uint16]
    """[B], of buckets of ids, which sum to 2^ID_SLOT_BITS; the last bucket: an id in plain bits."""
    id_bits: NDArray[np.uint8]
    """[B], log2 of the ids in each bucket."""
    tokens: NDArray[np.int32]
    """The ids of all buckets but the last, one after another."""

    @staticmethod
    def fit(samples: Sequence[Targets], vocab_size: int) -> "Prior":
        """The prior for targets like these; a hundred thousand rows are enough, a few thousand help already.

        Args:
            samples: ids [T, k], log-probabilities [T, k], log of the tail's mass [T], as for `codec.encode`; one k.
            vocab_size: V.

        Raises:
            CodecError: no rows, rows of several k, or what `codec.encode` would refuse.
        """
        from xlstm_distill.data.prior_fit import fit_prior

        return fit_prior(samples, vocab_size)

    @staticmethod
    def flat(vocab_size: int, top_k: int, steps: int = 0) -> "Prior":
        """The prior that knows nothing but shapes: what `prior=None` stands for."""
        return _flat(vocab_size, top_k, steps or default_steps(top_k))

    def to_bytes(self) -> bytes:
        """The prior as bytes, with version and checksum."""
        header = _HEADER.pack(
            MAGIC, VERSION, 0, self.vocab_size, self.top_k, self.steps, len(self.id_bits), len(self.tokens),
            *(int(x) for x in self.typical),
        )  # fmt: skip
        body = header + b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in self._arrays())
        return body + _CHECKSUM.pack(xxhash.xxh64_intdigest(body))

    @staticmethod
    def from_bytes(data: bytes) -> "Prior":
        """The prior in `data`.

        Raises:
            CodecError: no prior, of another version, damaged, or not consistent in itself.
        """
        if len(data) < _HEADER.size + _CHECKSUM.size or not data.startswith(MAGIC):
            raise CodecError(f"{len(data)} bytes that do not begin with the header of a prior")
        _, version, _, vocab_size, top_k, steps, buckets, known, *typical = _HEADER.unpack_from(data)
        if version != VERSION:
            raise CodecError(f"version {version} of a prior: this program reads {VERSION}")
        if xxhash.xxh64_intdigest(data[: -_CHECKSUM.size]) != _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0]:
            raise CodecError("checksum of the prior differs: the bytes were damaged or cut short")
        shapes: list[tuple[str, tuple[int, ...]]] = [
            ("<u2", (CONTEXTS, SYMBOLS)), ("<u2", (buckets,)), ("u1", (buckets,)), ("<i4", (known,)),
        ]  # fmt: skip
        sizes = [int(np.prod(shape)) * np.dtype(kind).itemsize for kind, shape in shapes]
        if sum(sizes) != len(data) - _HEADER.size - _CHECKSUM.size:
            raise CodecError(f"{len(data)} bytes do not fit what the prior says of itself")
        place, arrays = _HEADER.size, []
        for (kind, shape), size in zip(shapes, sizes, strict=True):
            found = np.frombuffer(data, kind, int(np.prod(shape)), place).reshape(shape)
            arrays.append(found.astype(found.dtype.newbyteorder("=")))
            place += size
        prior = Prior(vocab_size, top_k, steps, np.array(typical, np.int64), *arrays)
        prior._check()
        return prior

    @cached_property
    def digest(self) -> str:
        """xxh64 of `to_bytes`, 16 hexadecimal digits: what a sample says of the prior it was written with."""
        return xxhash.xxh64_hexdigest(self.to_bytes())

    @cached_property
    def grid(self) -> Grid:
        """The levels."""
        return grid(self.steps)

    @cached_property
    def for_rows(self) -> tuple[Any, ...]:
        """Last arguments of `describe`."""
        levels = self.grid
        return self.typical, levels.nats, levels.guesses

    @cached_property
    def for_write(self) -> tuple[Any, ...]:
        """Arguments of `write` behind the events."""
        start = _starts(self.frequency)
        id_start = _starts(self.id_frequency[None])[0]
        last = len(self.id_bits) - 1
        bucket, offset = np.full(self.vocab_size, last, np.int32), np.arange(self.vocab_size, dtype=np.int32)
        sizes = 1 << self.id_bits[:-1].astype(np.int64)
        numbers = np.repeat(np.arange(last), sizes)
        bucket[self.tokens] = numbers
        offset[self.tokens] = np.arange(len(self.tokens)) - (np.cumsum(sizes) - sizes)[numbers]
        return self.frequency, start, bucket, offset, self.id_frequency, id_start, self.id_bits

    @cached_property
    def for_read(self) -> tuple[Any, ...]:
        """Arguments of `read` from `slots` to `values`."""
        levels = self.grid
        symbols = np.arange(SYMBOLS, dtype=np.uint8)
        slots = np.stack([np.repeat(symbols, row) for row in self.frequency])
        id_slots = np.repeat(np.arange(len(self.id_bits), dtype=np.uint16), self.id_frequency)
        sizes = 1 << self.id_bits.astype(np.int64)
        base = np.cumsum(sizes) - sizes
        return (
            slots.ravel(), _packed(self.frequency).ravel(),
            id_slots, _packed(self.id_frequency[None])[0], (base << 8) | self.id_bits,
            self.tokens, self.typical, levels.nats, levels.guesses, levels.values,
        )  # fmt: skip

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return self.frequency, self.id_frequency, self.id_bits, self.tokens

    def _check(self) -> None:
        """Refuse what compiled code, which trusts a prior, could not bear."""
        if not len(self.id_bits) or int(self.id_bits.max()) > 24:
            raise CodecError("a prior that contradicts itself")
        lowest = len(self.grid.values) - 2 if FEWEST_STEPS <= self.steps <= MOST_STEPS else -1
        sizes = 1 << self.id_bits.astype(np.int64)
        good = (
            0 <= self.typical[0] <= lowest
            and 0 <= self.typical[1] <= lowest + 1
            and 0 < self.top_k <= min(self.vocab_size, MOST_KEPT)
            and self.vocab_size <= MOST_VOCABULARY
            and bool((self.frequency.sum(1, dtype=np.int64) == 1 << SLOT_BITS).all() and self.frequency.all())
            and int(self.id_frequency.sum(dtype=np.int64)) == 1 << ID_SLOT_BITS
            and bool(self.id_frequency.all())
            and int(self.id_bits[-1]) == (self.vocab_size - 1).bit_length()
            and int(self.id_frequency[-1]) % rare_unit(int(self.id_bits[-1])) == 0
            and int(sizes[:-1].sum()) == len(self.tokens) == len(np.unique(self.tokens))
            and (len(self.tokens) == 0 or (self.tokens.min() >= 0 and self.tokens.max() < self.vocab_size))
        )
        if not good:
            raise CodecError("a prior that contradicts itself")


def _starts(frequency: NDArray[np.uint16]) -> NDArray[np.uint16]:
    ends = np.cumsum(frequency, axis=1, dtype=np.int64)
    return (ends - frequency).astype(np.uint16)


def _packed(frequency: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """Frequency << 16 | start."""
    return (frequency.astype(np.uint32) << np.uint32(16)) | _starts(frequency).astype(np.uint32)


def rare_unit(plain_bits: int) -> int:
    """What the frequency of an id in so many plain bits must be a multiple of, for the coder's states to stay valid.

    A state holds [2^31, 2^63). What an event of frequency f in 2^s slots with b plain bits leaves above is at least
    f · 2^(31 − s − b), rounded down, before it is coded and 2^31 after; with a fraction rounded off it is less.
    """
    return 1 << max(0, ID_SLOT_BITS + plain_bits - 31)


def frequencies(weights: NDArray[np.floating], total: int) -> NDArray[np.uint16]:
    """Whole frequencies ≥ 1 that sum to `total`, as near to `weights` [N, S] as that allows."""
    total -= weights.shape[1]
    exact = weights / weights.sum(1, keepdims=True) * total
    whole = np.floor(exact).astype(np.int64)
    missing = total - whole.sum(1)
    ranks = np.argsort(np.argsort(whole - exact, axis=1, kind="stable"), axis=1, kind="stable")
    return (whole + (ranks < missing[:, None]) + 1).astype(np.uint16)


@lru_cache(maxsize=8)
def _flat(vocab_size: int, top_k: int, steps: int) -> Prior:
    if not 0 < vocab_size <= MOST_VOCABULARY:
        raise CodecError(f"vocab_size {vocab_size}: expected 1 to {MOST_VOCABULARY}")
    if not 0 < top_k <= min(vocab_size, MOST_KEPT):
        raise CodecError(f"k = {top_k}: expected 1 to {min(vocab_size, MOST_KEPT)}")
    if not FEWEST_STEPS <= steps <= MOST_STEPS:
        raise CodecError(f"{steps} steps: expected {FEWEST_STEPS} to {MOST_STEPS}")
    levels = grid(steps)
    weights = np.zeros((CONTEXTS, SYMBOLS))
    symbols = np.arange(SYMBOLS)
    weights[REFERENCE] = symbols <= OCTAVES
    weights[QUALITY] = symbols < QUALITIES
    weights[LENGTH] = symbols == 0
    # Differences: two-sided geometric about the middle. Steps: geometric.
    weights[FLOOR:STEP] = 0.8 ** np.abs(symbols - 31)
    weights[STEP:HIT] = 0.8**symbols
    weights[HIT:STAYS] = 0.8 ** np.abs(symbols - 31)
    stay = (np.arange(8) + 0.5) / 8
    ones = np.array([bin(mask).count("1") for mask in range(16)])
    weights[STAYS:, :16] = np.repeat(stay[:, None] ** ones * (1 - stay[:, None]) ** (4 - ones), 8, axis=0)
    typical = np.array([levels.guesses[MOST_BACK + n * NATS] >> 16 for n in (10, 2)], np.int64)
    return Prior(
        vocab_size, top_k, steps, typical, frequencies(weights + 1e-3, 1 << SLOT_BITS),
        np.array([1 << ID_SLOT_BITS], np.uint16), np.array([(vocab_size - 1).bit_length()], np.uint8),
        np.zeros(0, np.int32),
    )  # fmt: skip
