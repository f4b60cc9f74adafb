"""Eq. 14 on the bytes of tensors, in numpy: a job that only takes a mean starts and ends before torch is imported.

Products and sums are formed in float32 (float64 of float64), each rounded by itself in the order of the experts, and
the result is rounded to the experts' type once, to nearest even: the same bits on every processor.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.uint8]
"""The bytes of a tensor."""
FLOATS = {"F64": ("u8", "f8", 0x7FF << 52), "F32": ("u4", "f4", 0xFF << 23), "F16": ("u2", "f2", 0x1F << 10),
          "BF16": ("u2", "", 0xFF << 7)}  # fmt: skip
"""safetensors' name of a type that can be merged → its bits, its numbers in numpy, and the bits of its exponent."""
BLOCK = 1 << 16
"""Elements at one time: what they need fits the processor's cache."""


def weighted_sum(tensors: Sequence[Raw], weights: Sequence[float], dtype: str) -> Raw:
    """Σ weights[i] · tensors[i].

    Args:
        tensors: of one size; each of a type in `FLOATS`.
        weights: one per tensor.
        dtype: their type.

    Returns:
        The bytes of the sum in `dtype`.
    """
    bits = [tensor.view(FLOATS[dtype][0]) for tensor in tensors]
    result = np.empty_like(bits[0])
    exact = np.dtype("f8" if dtype == "F64" else "f4")
    factors = [exact.type(weight) for weight in weights]
    with np.errstate(all="ignore"):  # what is not finite is told by its name
        for begin in range(0, len(result), BLOCK):
            part = slice(begin, begin + BLOCK)
            total = widened(bits[0][part], dtype) * factors[0]
            for tensor, factor in zip(bits[1:], factors[1:], strict=True):
                term = widened(tensor[part], dtype)
                total += term * factor
            result[part] = narrowed(total, dtype)
    return result.view(np.uint8)


def widened(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Bits of `dtype` as float32, or as float64 where that is what they are."""
    if dtype == "BF16":
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return bits.view(FLOATS[dtype][1]).astype("f8" if dtype == "F64" else "f4", copy=False)


def narrowed(numbers: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Bits of `dtype` of the nearest numbers, ties to even; overwrites float32 `numbers` for BF16."""
    if dtype != "BF16":
        return numbers.astype(FLOATS[dtype][1], copy=False).view(FLOATS[dtype][0])
    bits = numbers.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    bits += odd
    bits >>= 16
    return bits.astype(np.uint16)


def is_finite(tensor: Raw, dtype: str) -> bool:
    """Whether no element of a type in `FLOATS` is a NaN or infinite: no exponent is all ones."""
    kind, _, exponent = FLOATS[dtype]
    bits, ones = tensor.view(kind), np.dtype(kind).type(exponent)
    parts = (bits[begin : begin + BLOCK] for begin in range(0, len(bits), BLOCK))
    return all((part & ones).max() < ones for part in parts)
