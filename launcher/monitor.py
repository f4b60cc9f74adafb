"""`xdl status` and `xdl logs`: everything is read from the run folder, so they work while jobs run and after."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from launcher.plan import Graph
from launcher.progress import duration, last_record, loss_of, speed_of
from launcher.runs import find_run, read_graph
from xlstm_distill.contract.exitcode import DONE, Mistake
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.state import begun

QUIET = 600.0
"""Seconds without a sign of life after which an unfinished job counts as stopped, where no scheduler can be asked."""
FOLLOW_EVERY = 10.0


@dataclass(frozen=True)
class JobStatus:
    """One row of `xdl status`."""

    name: str
    state: str
    """done, running, stopped, queued or waiting."""
    step: str = ""
    loss: str = ""
    speed: str = ""
    age: str = ""
    """Time since the job last wrote."""


def job_status(folder: Path, name: str, waiting: bool, in_queue: bool = False) -> JobStatus:
    """How a job stands, from its folder and what the queue says."""
    record = last_record(folder)
    seen = _last_sign(folder)
    age = duration(time.time() - seen) if seen else ""
    if read_manifest(folder / "manifest.json"):
        state = "done"
    elif in_queue:
        state = "running" if seen and time.time() - seen < QUIET else "queued"
    elif not begun(folder) and not seen:
        state = "waiting"
    else:
        state = "running" if waiting and seen and time.time() - seen < QUIET else "stopped"
    loss, speed = loss_of(record), speed_of(record)
    step = f"{record['step']}/{record.get('total', '?')}" if "step" in record else ""
    return JobStatus(name, state, step, _number(loss, ".4g"), _number(speed, ",.0f"), age)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _last_sign(folder: Path) -> float:
    """Time of the newest log line or metric; 0: none."""
    files = [folder / "metrics.jsonl", *(folder / "logs").glob("*.log")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def run_status(folder: Path) -> list[JobStatus]:
    """How every job of a run stands."""
    jobs = read_graph(folder).get("jobs", {})
    ids = {name: job["id"] for name, job in jobs.items() if job.get("id")}
    alive = _queued(set(ids.values()))
    held = _held(folder / "lock")
    return [job_status(folder / "jobs" / name, name, held, ids.get(name) in alive) for name in jobs]


def _queued(ids: set[str]) -> set[str]:
    from launcher.backends import slurm

    try:
        return slurm.queued(ids) if ids and slurm.answers() else set()
    except Mistake:
        return set()


def _held(lock: Path) -> bool:
    """Whether a launch or one of its jobs holds the run's lock."""
    import fcntl

    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def show_status(run: str, runs: str) -> None:
    """Print the jobs of a run, or one line per run.

    Raises:
        Mistake: there is no such run.
    """
    folders = [find_run(run, runs)] if run else [path.parent for path in sorted(Path(runs).glob("*/graph.json"))]
    if not folders:
        raise Mistake(f"{Path(runs).absolute()}: no runs; start one with xdl launch")
    if run or len(folders) == 1:
        print(folders[0].absolute())
        print(table([JobStatus("job", "state", "step", "loss", "tok/s", "age"), *run_status(folders[0])]))
        return
    for folder in folders:
        rows = run_status(folder)
        busy = [row.name for row in rows if row.state == "running"]
        done = sum(row.state == "done" for row in rows)
        print(f"{folder.name}: {done} of {len(rows)} done{', running ' + ', '.join(busy) if busy else ''}")


def table(rows: list[JobStatus]) -> str:
    """Rows as aligned columns."""
    cells = [list(vars(row).values()) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def show_log(run: str, job: str, rank: int, follow: bool, runs: str) -> None:
    """Print a job's log, and with `follow` what is added to it.

    Raises:
        Mistake: no such run, job or log.
    """
    path = log_of(find_run(run, runs), job, rank)
    print(f"==> {path}", file=sys.stderr)
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in _grow(file) if follow else (file.read(),):
            sys.stdout.write(text)
            sys.stdout.flush()


def log_of(folder: Path, job: str, rank: int) -> Path:
    """The log of a rank of a job; without a job, of the one that wrote last."""
    jobs = list(read_graph(folder).get("jobs", {}))
    if job and job not in jobs:
        raise Mistake(f"{job}: no such job in {folder.name}; it has {', '.join(jobs)}")
    names = [job] if job else jobs
    found = [path for name in names for path in (folder / "jobs" / name / "logs").glob(f"rank-{rank}.log")]
    if not found:
        raise Mistake(f"{job or folder.name}: no log of rank {rank} yet")
    return max(found, key=lambda path: path.stat().st_mtime)


def _grow(file: TextIO) -> Iterator[str]:
    while True:
        if text := file.read():
            yield text
        else:
            time.sleep(0.2)


def follow_run(folder: Path, graph: Graph) -> int:
    """Print each change until no job of the graph is queued or running; 0 when all are done, else 1."""
    shown: dict[str, str] = {}
    while True:
        rows = [row for row in run_status(folder) if row.name in graph.names]
        for row in rows:
            if (text := f"{row.name}: {row.state} {row.step}".rstrip()) != shown.get(row.name):
                shown[row.name] = text
                print(text, flush=True)
        if not any(row.state in ("queued", "running") for row in rows):
            return DONE if all(row.state == "done" for row in rows) else 1
        time.sleep(FOLLOW_EVERY)
