"""What a device could do, and what memory it holds: the denominators of the metrics."""

import re
import resource
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

BFLOAT16_PEAKS = (
    ("gb200", 2500e12),
    ("b200", 2250e12),
    ("gh200", 989e12),
    ("h200 nvl", 836e12),
    ("h200", 989e12),
    ("h100 nvl", 835e12),
    ("h100 pcie", 756e12),
    ("h100", 989e12),
    ("h800", 989e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("a30", 165e12),
    ("a40", 149.7e12),
    ("rtx a6000", 154.8e12),
    ("a10", 125e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("rtx 4090", 165.2e12),
    ("rtx 3090", 71e12),
    ("mi355x", 2500e12),
    ("mi325x", 1307.4e12),
    ("mi300x", 1307.4e12),
    ("mi300a", 980.6e12),
    ("mi250x", 191.5e12),  # of one of the card's two chips: each is a device
)
"""Words of the device's name → FLOP/s in bfloat16 with float32 accumulation, dense, by the makers' data sheets. The
first that fits counts. Absent: what has no matrix units for bfloat16 (V100), or is given in several ways (A10G)."""
MEASURE_SECONDS = 0.2


class Peak(NamedTuple):
    """FLOP/s that one device can make."""

    flops: float
    source: str
    """For the log."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of products in `dtype`: from the table for bfloat16, else measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if dtype == torch.bfloat16 and device.type == "cuda" and (listed := listed_peak(name)):
        return Peak(listed, f"{name}, data sheet")
    return Peak(measured_peak(device, dtype), f"{name}, measured with a product of matrices")


def listed_peak(name: str) -> float | None:
    """FLOP/s of the device of that name by `BFLOAT16_PEAKS`."""
    words = f" {' '.join(re.split(r'[^a-z0-9]+', name.lower()))} "
    return next((flops for key, flops in BFLOAT16_PEAKS if f" {key} " in words), None)


@cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of the products of two square matrices that fit `MEASURE_SECONDS`; draws no random number."""
    size = 4096 if device.type == "cuda" else 1024
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    best, spent, rounds = float("inf"), 0.0, 0
    while spent < MEASURE_SECONDS or rounds < 3:  # the first one warms up
        _wait(device)
        began = time.perf_counter()
        left @ left
        _wait(device)
        seconds = time.perf_counter() - began
        best, spent, rounds = min(best, seconds), spent + seconds, rounds + 1
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_gb(device: torch.device) -> dict[str, float]:
    """10⁹ bytes, by tag: on a GPU allocated now and at most so far, on a CPU resident in this process."""
    if device.type == "cuda":
        return {
            "memory/allocated_gb": torch.cuda.memory_allocated(device) / 1e9,
            "memory/peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        }
    return {"memory/rss_gb": _resident() / 1e9}


def _resident() -> float:
    """Bytes; where there is no /proc, the most so far."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
