"""How much of a training's wall-clock time went into steps that count, over all its processes.

`metrics.jsonl` has a record per step with its `seconds`; a process that resumes drops the records of the steps that it
makes again, so each step that counts is there once. `ledger.jsonl` says when processes started, and when one finished:

    {"event": "start", "time": 1792480000.0, "step": 300, "ranks": 8, "strategy": "fsdp", "host": "node17", …}
    {"event": "end", "time": 1792483600.0, "step": 500}
"""

import json
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from xlstm_distill.contract.files import append_line, read_lines

NAME = "ledger.jsonl"
_SECONDS = re.compile(rb'"seconds": ([0-9.e+-]+)[,}]')
_TAIL = 1 << 16
"""Bytes at the end of `metrics.jsonl` in which its last record stands."""


def record_start(folder: Path, step: int, **facts: Any) -> None:
    """This process goes on from `step`; its time is when it was started. Rank 0, once per process."""
    append_line(folder / NAME, {"event": "start", "time": process_start(), "step": step, **facts})


def record_end(folder: Path, step: int) -> None:
    """The training is finished: until it is started again, with a larger budget, no time is lost."""
    append_line(folder / NAME, {"event": "end", "time": time.time(), "step": step})


def starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a job's processes in their order."""
    return [line for line in read_lines(folder / NAME) if line["event"] == "start"]


def restarts(folder: Path) -> int:
    """How often the job was started again."""
    return max(0, len(starts(folder)) - 1)


def productive_seconds(folder: Path) -> float:
    """Σ of the steps' `seconds`, each step once: without validation, waiting for checkpoints, starting."""
    try:
        text = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return 0.0
    return sum(map(float, _SECONDS.findall(text)))  # parsing it all would cost `xdl status` seconds


def wall_seconds(folder: Path, now: float | None = None) -> float:
    """From the first start to `now` (default: to the newest line), without the time between an end and a new start."""
    lines = read_lines(folder / NAME)
    if not lines:
        return 0.0
    newest = max(_newest_metric(folder), *(line["time"] for line in lines))
    pauses = [after["time"] - before["time"] for before, after in pairwise(lines) if before["event"] == "end"]
    return float((newest if now is None else now) - lines[0]["time"] - sum(pauses))


def _newest_metric(folder: Path) -> float:
    """Time of the last whole record of `metrics.jsonl`; 0: none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0.0
    for line in reversed(lines):
        try:
            return float(json.loads(line)["time"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0.0


def goodput(folder: Path) -> float:
    """Productive time ÷ wall time over all processes of the job so far; 0 before its first step."""
    wall = wall_seconds(folder)
    return productive_seconds(folder) / wall if wall > 0 else 0.0


def process_start() -> float:
    """When this process was started, seconds since 1970; now, where the system does not say."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.time() - max(0.0, age)
