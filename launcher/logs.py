"""`xdl logs`: a job's logs, and what in them says why it failed.

logs/  rank-R.log  rank-R.element-A.log (elements of an array that run side by side)  slurm-ID.log (the batch script's)
"""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from launcher.runs import find_run, read_graph
from xlstm_distill.contract.exitcode import Mistake

TAIL = 1 << 16
"""Bytes of a log that are searched for errors, from its end."""
MOST_TROUBLED = 8
"""Logs of ranks in trouble that are printed besides rank 0's."""
LOOK_SECONDS = 2.0
"""Between looks for further logs, while some are followed."""
POLL = 0.2
"""Seconds between looks at logs that are followed."""
PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""What torch puts before each line of a traceback that nobody caught."""
TRACEBACK = "Traceback (most recent call last)"
RANK_LOG = re.compile(r"rank-(\d+)(?:\.element-(\d+))?\.log")
LOST_TASKS = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+)$", re.MULTILINE)
"""What srun says of tasks that ended badly, the first to do so first."""
STUCK = re.compile(r"^(rank (\d+) .*is stuck.*?)(?:\. Its Python stack .*)?$")
"""What the watchdog says, in the log of every rank."""


@dataclass(frozen=True)
class Failure:
    """Who failed, and its last word."""

    rank: int | None
    """None: the batch script, or what runs before the ranks."""
    error: str


def rank_of(log: Path) -> int:
    """The rank that writes a log; −1: none."""
    found = RANK_LOG.fullmatch(log.name)
    return int(found[1]) if found else -1


def rank_logs(job: Path) -> list[Path]:
    """The logs of a job's ranks, by rank and element."""
    found = [(match, path) for path in (job / "logs").glob("rank-*.log") if (match := RANK_LOG.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda one: (int(one[0][1]), int(one[0][2] or 0)))]


def batch_logs(job: Path, id: str = "") -> list[Path]:
    """What batch scripts wrote, those that wrote last at the end; with an id of this submission alone."""
    found = [path for path in (job / "logs").glob("slurm-*.log") if not id or _submission(path) >= int(id)]
    return sorted([*found, *(job / "logs").glob("launch.log")], key=_written)


def _submission(path: Path) -> int:
    digits = re.match(r"slurm-(\d+)", path.name)
    return int(digits[1]) if digits else -1


def _written(path: Path) -> float:
    return path.stat().st_mtime


def tail(path: Path) -> str:
    """The end of a log."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL))
        return file.read().decode(errors="replace")


def last_error(text: str) -> str:
    """The last line of a log that says what went wrong: `error: …`, who is stuck, or what a traceback ends with; empty:
    none does."""
    found, inside = "", False
    for line in (PREFIX.sub("", line) for line in text.splitlines()):
        if line.startswith("error: "):
            found = line.removeprefix("error: ")
        elif stuck := STUCK.match(line):
            found = stuck[1]
        elif TRACEBACK in line:
            inside = True
        elif inside and line and not line[0].isspace():
            found, inside = line, False
    return found or (TRACEBACK if inside else "")


def failure_of(job: Path, id: str = "") -> Failure | None:
    """Who made a job fail and its last line about it: of the task that srun lost first, else of the log with an error
    that fell silent first; None where no log says anything.

    Args:
        job: the job folder.
        id: the scheduler's, so that no earlier submission's batch script is asked.
    """
    batch = next((tail(path) for path in reversed(batch_logs(job, id))), "")
    first, after = _first_lost(batch)
    if told := last_error(batch[after:]):
        return Failure(None, told)
    logs = rank_logs(job)
    if first:
        rank = min(_numbers(first[1]))
        said = [last_error(tail(path)) for path in logs if rank_of(path) == rank] if "exit code" in first[2] else []
        return _stuck(Failure(rank, max(said, default="") or first[2]))
    troubled = sorted((_written(path), rank_of(path), told) for path in logs if (told := last_error(tail(path))))
    return _stuck(Failure(*troubled[0][1:])) if troubled else None


def _stuck(failure: Failure) -> Failure:
    """The watchdog speaks in all logs: whom it names counts."""
    named = STUCK.match(failure.error)
    return Failure(int(named[2]), failure.error) if named else failure


def _first_lost(batch: str) -> tuple[re.Match[str] | None, int]:
    """The first of the tasks that srun lost in the newest start of those that share a log, and where its words about
    that start end."""
    first, seen, end = None, set[int](), 0
    for line in LOST_TASKS.finditer(batch):
        tasks = _numbers(line[1])
        if first is None or seen & tasks:  # a task is lost once in a start
            first, seen = line, set()
        seen |= tasks
        end = line.end()
    return first, end


def _numbers(tasks: str) -> set[int]:
    """`0-2,5` → {0, 1, 2, 5}."""
    ranges = [part.partition("-") for part in tasks.split(",")]
    return {number for low, _, high in ranges for number in range(int(low), int(high or low) + 1)}


def logs_of(job: Path, rank: int | None = None) -> list[Path]:
    """The logs to show: of one rank, or rank 0's and those of ranks in trouble; the batch script's where no rank wrote
    or where only it says what went wrong."""
    logs = rank_logs(job)
    if rank is not None:
        return [path for path in logs if rank_of(path) == rank]
    troubled = [path for path in logs if rank_of(path) > 0 and last_error(tail(path))]
    batch = batch_logs(job)[-1:]
    told = [path for path in batch if not logs or last_error(tail(path)[_first_lost(tail(path))[1] :])]
    return [*told, *(path for path in logs if rank_of(path) == 0), *sorted(troubled, key=_written)[:MOST_TROUBLED]]


def chosen_job(run: Path, job: str) -> str:
    """The job named, or the one that wrote last.

    Raises:
        Mistake: the run has no such job, or no log yet.
    """
    jobs = list(read_graph(run).get("jobs", {}))
    if job and job not in jobs:
        raise Mistake(f"{job}: no such job in {run.name}; it has {', '.join(jobs)}")
    written = [(_written(path), name) for name in jobs for path in (run / "jobs" / name / "logs").glob("*.log")]
    if not job and not written:
        raise Mistake(f"{run.name}: no log yet")
    return job or max(written)[1]


def show_logs(run: str, job: str, rank: int | None, follow: bool, runs: str) -> None:
    """Print the logs of a job, and with `follow` what is added to them.

    Args:
        run: name or path.
        job: empty: the job that wrote last.
        rank: None: rank 0 and the ranks in trouble.
        follow: until Ctrl-C.
        runs: folder of the runs.

    Raises:
        Mistake: no such run, job or log.
    """
    folder = find_run(run, runs)
    name = chosen_job(folder, job)
    paths = logs_of(folder / "jobs" / name, rank)
    if not paths:
        raise Mistake(f"{name}: no log{'' if rank is None else f' of rank {rank}'} yet")
    if len(paths) == 1:
        print(f"==> {paths[0]} <==", file=sys.stderr)
    with ExitStack() as opened:
        for text in _texts(lambda: logs_of(folder / "jobs" / name, rank), opened, follow):
            sys.stdout.write(text)
            sys.stdout.flush()


def _texts(paths: Callable[[], Sequence[Path]], opened: ExitStack, follow: bool) -> Iterator[str]:
    """What stands in the files, then what is added, also in files that come later (a restart's, a rank's that gets into
    trouble); each under its name where there are several."""
    files: dict[Path, TextIO] = {}
    shown, looked = None, float("-inf")
    while True:
        if time.monotonic() - looked >= LOOK_SECONDS:
            for path in paths():
                if path not in files:
                    files[path] = opened.enter_context(path.open(encoding="utf-8", errors="replace"))
            looked = time.monotonic()
        grown = False
        for path, file in files.items():
            if text := file.read():
                grown = True
                yield (f"==> {path} <==\n" if path != shown and len(files) > 1 else "") + text
                shown = path
        if not follow:
            return
        if not grown:
            time.sleep(POLL)
