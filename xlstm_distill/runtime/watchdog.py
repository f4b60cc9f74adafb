"""A rank that makes no step for too long is named with its Python stack, and the job ends to be started again.

Each rank has a thread that keeps its heartbeat (`runtime/heartbeat.py`) in a file, because files outlive their rank,
whichever it is. The thread of any rank that has made no step for T seconds reads all of them, says whom the others are
waiting for, and ends its process; all ranks wait for that one, so all of them do this at about the same time. A main
thread that holds the interpreter's lock stops this thread too: then faulthandler, in C, prints all stacks and ends the
process, when its timer runs out or when another rank on the host asks for it. A wait for a save may last longer than T,
but not for a rank whose process does not run.
"""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from xlstm_distill.contract.exitcode import STUCK
from xlstm_distill.contract.job import World
from xlstm_distill.runtime import heartbeat
from xlstm_distill.runtime.heartbeat import Heartbeat

STDERR = 2
"""The descriptor: a stuck thread may hold the lock of `sys.stderr`."""
MOST_SECONDS_BETWEEN = 15.0
"""Between two heartbeats."""
LINGER_SECONDS = 2.0
"""Between the words and the end: the other ranks speak too before their connections break."""
LAST_SECONDS = 6.0
"""For the words: a file system that hangs must not keep the process."""
MOST_NAMED = 8
"""Ranks whose stacks are printed."""


class Watchdog:
    """`with Watchdog(job_folder, world, T) as watchdog: … watchdog.beat(step, "forward")`, by the main thread.

    Counts from the first beat on. Whatever may last longer than T beats in between.

    Args:
        folder: of the job; `heartbeats/` in it is this class's.
        world: this process among its ranks.
        seconds: T; 0: off.
    """

    def __init__(self, folder: Path, world: World, seconds: float) -> None:
        self.folder, self.world, self.seconds = folder, world, seconds
        self._beats = folder / "heartbeats"
        self._last = (0, 0, "start", time.monotonic(), 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            with suppress(OSError):  # the first checkpoint will tell
                heartbeat.clear(self._beats, self.world.size)
            if not faulthandler.is_enabled():
                faulthandler.enable(STDERR)
            self._write()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.seconds:
            self._ended.set()
            self._thread.join(5.0)  # it may be waiting for the file system
            faulthandler.cancel_dump_traceback_later()
            with suppress(OSError):
                heartbeat.path_of(self._beats, self.world.rank).unlink(missing_ok=True)

    def beat(self, step: int, phase: str, patience: float = 0.0) -> None:
        """The main thread is at the beginning of `phase` of `step`. As often on every rank; costs a microsecond.

        Args:
            step: steps made.
            phase: in a word.
            patience: seconds that it may last where they are more than T, as long as the processes of all ranks run: it
                waits for a disk.
        """
        count = self._last[0] + (not patience)  # a save may be over before some of the ranks would wait
        self._last = (count, step, phase, time.monotonic(), patience)

    def _watch(self) -> None:
        """The thread: wakes for the next heartbeat, or when T seconds without a step are over."""
        between = min(self.seconds / 4, MOST_SECONDS_BETWEEN)
        due = time.monotonic()
        excused = 0.0
        while True:
            now = time.monotonic()
            beats, _, _, since, patience = self._last
            bound = max(since + self.seconds, excused)
            if beats and now >= bound:
                if now - since >= patience or self._silent():
                    self._end(now - since)
                bound = excused = now + self.seconds / 2
            if now >= due:
                due = now + between
                if beats:  # also re-arms; a start may hold the interpreter's lock for long
                    faulthandler.dump_traceback_later(self.seconds + 1, exit=True, file=STDERR)
                self._write()
            left = bound - now if beats else between
            if self._ended.wait(max(0.01, min(due - now, left))):
                return

    def _silent(self) -> bool:
        """Whether the process of another rank does not run any more. One that has ended well left no file."""
        found, now = heartbeat.read(self._beats, self.world.size), time.time()
        return any(now - beat.time > self.seconds / 2 for rank, beat in found.items() if rank != self.world.rank)

    def _write(self) -> None:
        if self._ended.is_set():
            return
        with suppress(OSError):  # a full disk is the checkpoint's to tell
            heartbeat.write(self._beats, self._mine())

    def _mine(self) -> Heartbeat:
        beats, step, phase, since, _ = self._last
        return heartbeat.take(self.world.rank, beats, step, phase, time.time() - (time.monotonic() - since))

    def _end(self, silence: float) -> None:
        """Say who is stuck, and end this process."""
        faulthandler.dump_traceback_later(LAST_SECONDS, exit=True, file=STDERR)
        self._write()
        found = heartbeat.read(self._beats, self.world.size)
        named, reason = heartbeat.culprits(found, self.world.size, time.time(), self.seconds / 2)
        _say(f"watchdog: rank {self.world.rank} made no step for {silence:.0f} s (guard.stuck_seconds)\n")
        for rank in named[:MOST_NAMED]:
            _say(report(rank, found.get(rank), reason))
        if len(named) > MOST_NAMED:
            _say(f"… and {len(named) - MOST_NAMED} ranks more\n")
        if self.world.rank in named:
            _say("All threads of this process, the innermost call first:\n")
            faulthandler.dump_traceback(STDERR, all_threads=True)
        dump_collectives(self.folder / "logs", self.world.rank)
        time.sleep(LINGER_SECONDS)
        if reason == heartbeat.SILENT:
            again = heartbeat.read(self._beats, self.world.size)
            heartbeat.kill([again[rank] for rank in named if rank in again and again[rank] == found.get(rank)])
        os._exit(STUCK)


def _say(text: str) -> None:
    os.write(STDERR, text.encode(errors="replace"))


def report(rank: int, beat: Heartbeat | None, reason: str) -> str:
    """Lines about a rank that is stuck."""
    if beat is None:
        return f"rank {rank} is stuck: {reason}; it left no heartbeat\n"
    silence, seen = time.time() - beat.since, time.time() - beat.time
    where = f"rank {rank} (host {beat.host}, pid {beat.pid}) is stuck at step {beat.step}, {beat.phase}"
    head = f"{where}, for {silence:.1f} s: {reason}. Its Python stack {seen:.1f} s ago, the innermost call last:"
    return "\n".join([head, *beat.stack, ""])


def flight_recorder(logs: Path) -> None:
    """Let torch keep the last collectives of each rank, and write them to `logs`/collectives-R when one times out, or
    when the watchdog ends the process. To read them: `torchfrtrace --prefix collectives- LOGS`. Call it before the
    process group is made; what the user has set stays."""
    logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(logs / "collectives-"))


def dump_collectives(logs: Path, rank: int) -> None:
    """What torch's flight recorder holds, to the file that it would write by itself."""
    c10d = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    if dump is not None and os.environ.get("TORCH_FR_BUFFER_SIZE", "0") != "0":
        with suppress(OSError):
            (logs / f"collectives-{rank}").write_bytes(
                dump(includeStackTraces=False)
            )  # to find their symbols takes seconds
