"""What a device could do, and what memory it holds: the denominators of the metrics."""

import resource
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from xlstm_distill.contract.devices import find_device

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
    """FLOP/s of the device of that name by `contract.devices`."""
    device = find_device(name)
    return device.flops if device else None


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
