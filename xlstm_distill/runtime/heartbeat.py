"""Where each rank stands, in a file that others and people can read: also when the rank is stopped or dead.

JOB/heartbeats/rank-R.json      {rank, host, pid, started, time, beats, step, phase, since, stack}
"""

import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

SILENT = "its process does not run: stopped, dead or out of reach"
BUSY = "it waits for no other rank, as the others do"
BEHIND = "it is behind the others"
UNKNOWN = "all wait for each other"
WAITS = ("/torch/distributed/", "/torch/autograd/graph.py", "/torch/cuda/")
"""Files of the innermost frame of a thread that may be waiting for other ranks."""
WAITING_CALLS = (".item(", ".tolist(", ".cpu(", ".synchronize(")
"""Calls that wait for a GPU, which may be waiting for other ranks."""

ABORT_SECONDS = 0.3
"""For the stacks of a process that was told to end."""


@dataclass(frozen=True)
class Heartbeat:
    """A rank, at the time of writing."""

    rank: int
    host: str
    pid: int
    started: int
    """When the process began, as the kernel counts: tells it from a later one with its pid. 0: unknown."""
    time: float
    """Unix seconds of this writing."""
    beats: int
    """So many times the rank said where it is."""
    step: int
    phase: str
    """What it said last."""
    since: float
    """Unix seconds when it said so."""
    stack: Sequence[str]
    """Lines of the main thread's Python stack, the innermost call last."""


def take(rank: int, beats: int, step: int, phase: str, since: float) -> Heartbeat:
    """This process now."""
    pid = os.getpid()
    return Heartbeat(
        rank, platform.node(), pid, _started(pid), time.time(), beats, step, phase, since, _stack_of_main()
    )


def _stack_of_main() -> list[str]:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return [line for entry in traceback.format_stack(frame) for line in entry.splitlines()] if frame else []


def _started(pid: int) -> int:
    """Clock ticks between the machine's start and the process's; 0: unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])  # the name in brackets may hold anything


def path_of(folder: Path, rank: int) -> Path:
    """The file of a rank, in the folder of heartbeats."""
    return folder / f"rank-{rank}.json"


def write(folder: Path, beat: Heartbeat) -> None:
    """Whole or not at all, but not flushed to the disk: it serves the moment."""
    path = path_of(folder, beat.rank)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(asdict(beat), indent=1), encoding="utf-8")
    beside.replace(path)


def read(folder: Path, ranks: int) -> dict[int, Heartbeat]:
    """What is there of ranks 0 … `ranks` − 1."""
    found = {}
    for rank in range(ranks):
        with suppress(OSError, ValueError, TypeError):
            found[rank] = Heartbeat(**json.loads(path_of(folder, rank).read_text(encoding="utf-8")))
    return found


def clear(folder: Path, ranks: int) -> None:
    """Make the folder; remove what an earlier start with more ranks left."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("rank-*.json"):
        if path.stem.removeprefix("rank-").isdigit() and int(path.stem.removeprefix("rank-")) >= ranks:
            path.unlink(missing_ok=True)


def culprits(found: Mapping[int, Heartbeat], ranks: int, now: float, silent_seconds: float) -> tuple[list[int], str]:
    """Who keeps the others from going on, and why we think so. The first of these that is not empty:

    ranks whose file is missing or older than `silent_seconds`; ranks that are not waiting for others; ranks that are
    behind; all.

    Args:
        found: by rank.
        ranks: their number.
        now: unix seconds.
        silent_seconds: a living rank writes several times as often.
    """
    silent = [rank for rank in range(ranks) if rank not in found or now - found[rank].time > silent_seconds]
    if silent:
        return silent, SILENT
    if busy := [rank for rank in range(ranks) if not waits(found[rank].stack)]:
        return busy, BUSY
    ahead = max(beat.beats for beat in found.values())
    if behind := [rank for rank in range(ranks) if found[rank].beats < ahead]:
        return behind, BEHIND
    return list(range(ranks)), UNKNOWN


def waits(stack: Sequence[str]) -> bool:
    """Whether a thread with this stack may be waiting for other ranks."""
    innermost = next((n for n in reversed(range(len(stack))) if stack[n].startswith('  File "')), None)
    if innermost is None:
        return False
    code = "".join(stack[innermost + 1 :])
    return any(part in stack[innermost] for part in WAITS) or any(call in code for call in WAITING_CALLS)


def kill(beats: Collection[Heartbeat]) -> None:
    """End those of the processes that are on this host and still the same: with SIGABRT, at which faulthandler prints
    all stacks, then with SIGKILL: one that was stopped heeds nothing else."""
    for number, wait in ((signal.SIGABRT, ABORT_SECONDS), (signal.SIGKILL, 0.0)):
        for beat in (b for b in beats if b.host == platform.node() and b.started and _started(b.pid) == b.started):
            with suppress(OSError):
                os.kill(beat.pid, number)
        time.sleep(wait)
