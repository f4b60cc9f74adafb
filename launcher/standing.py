"""How one job stands: from its folder, from what its batch script noted in `ends`, and from what Slurm says of it.

| state | meaning |
| --- | --- |
| done | its manifest stands |
| running | Slurm runs it, or a launch on this machine does |
| queued | Slurm will run it when there is room; the reason is Slurm's (Priority, Resources, BeginTime, …) |
| waiting | for other jobs: in Slurm's queue (Dependency), behind others of a launch here, or not launched at all |
| stopped | ended by request or by its launch's end; a launch goes on from its checkpoint |
| failed | ended with another code than 0 or 75, or Slurm ended it (TIMEOUT, NODE_FAIL, OUT_OF_MEMORY, …) |
| cancelled | taken from the queue, by someone or because what it waited for failed |
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.logs import failure_of
from launcher.progress import last_record, loss_of, seconds_left, speed_of
from launcher.scheduler import Sight, Task
from xlstm_distill.contract import ledger
from xlstm_distill.contract.exitcode import DONE, STOPPED, Mistake
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.state import begun

State = Literal["done", "running", "queued", "waiting", "stopped", "failed", "cancelled"]
QUIET = 600.0
"""Seconds without a sign of life after which a job counts as not running, where no scheduler can be asked."""
NOT_LAUNCHED = "not launched"
CANCELLED = "cancelled"
"""Stands in place of an exit code in `ends`: `xdl cancel` wrote the line."""


@dataclass(frozen=True)
class JobStatus:
    """A row of `xdl status`; None: unknown, or there is none."""

    name: str
    stage: str
    expert: str | None
    id: str | None
    """The scheduler's."""
    state: State
    reason: str | None = None
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    step_age_s: float | None = None
    """Seconds since the newest step was made."""
    checkpoint_age_s: float | None = None
    """Seconds since the newest checkpoint was whole."""
    restarts: int | None = None
    eta_s: float | None = None
    """Seconds until the last step, at the recent pace, of a job that runs."""
    goodput: float | None = None
    """Time of steps that count ÷ wall-clock time, over all starts."""
    rank: int | None = None
    """Which rank failed."""
    error: str | None = None
    """Its last line about it."""

    @property
    def alive(self) -> bool:
        """Whether something will come of it without a new launch."""
        return self.state in ("running", "queued") or (self.state == "waiting" and self.reason != NOT_LAUNCHED)


@dataclass(frozen=True)
class End:
    """A line of `ends`: a start of a job, or of an array's element, has ended."""

    element: str
    restarts: int
    time: float
    code: int | None
    """Exit code of the stage; None: cancelled."""


def read_ends(folder: Path, id: str) -> list[End]:
    """The lines of JOB/ends about the submission `id`, `local` for a launch on this machine."""
    try:
        lines = (folder / "ends").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for words in map(str.split, lines):
        if len(words) == 4 and words[0].partition("_")[0] == id:
            try:
                code = None if words[3] == CANCELLED else int(words[3])
                found.append(End(words[0], int(words[1]), float(words[2]), code))
            except ValueError:
                continue  # cut by a full disk
    return found


def status_of(folder: Path, name: str, known: Mapping[str, Any], sight: Sight, launch_at: str | None) -> JobStatus:
    """A job's row.

    Args:
        folder: the job folder.
        name: the job's.
        known: what `graph.json` says about it.
        sight: what Slurm says.
        launch_at: the job that a launch on this machine is at; empty: it is at none; None: there is no such launch.
    """
    id, stage = known.get("id") or None, known.get("stage", "")
    expert = name.removeprefix("distill-") if stage == "distill" else None
    try:
        done = read_manifest(folder / "manifest.json") is not None
        state, reason = ("done", None) if done else _state(folder, id, sight, launch_at)
    except Mistake as mistake:
        return JobStatus(name, stage, expert, id, "failed", error=str(mistake))
    row = _progress(JobStatus(name, stage, expert, id, state, reason), folder, known.get("pieces") or [])
    if state == "failed" and (failure := failure_of(folder, id or "")):
        row = replace(row, rank=failure.rank, error=failure.error)
    return row


def _state(folder: Path, id: str | None, sight: Sight, launch_at: str | None) -> tuple[State, str | None]:
    if launch_at == folder.name:
        return "running", None
    if id is None:
        return _ended_here(folder, launch_at is not None)
    ends = read_ends(folder, id)
    if not sight.answered:
        return _unasked(folder, ends, sight.why)
    tasks = sight.of(id)
    alive = [task for task in tasks if not task.ended]
    return _in_queue(alive, tasks) if alive else _ended(folder, tasks, ends)


def _in_queue(alive: Sequence[Task], tasks: Sequence[Task]) -> tuple[State, str | None]:
    failed = [
        task.id.rpartition("_")[2] for task in tasks if task.ended and task.state not in ("COMPLETED", "CANCELLED")
    ]
    if running := [task for task in alive if not task.waits]:
        told = [task.state.capitalize() for task in running if task.state != "RUNNING"]
        told += [f"element {', '.join(failed)} failed"] if failed else []
        return "running", ", ".join(dict.fromkeys(told)) or None
    reason = alive[0].reason or None
    return ("waiting" if (reason or "").startswith("Dependency") else "queued"), reason


def _ended(folder: Path, tasks: Sequence[Task], ends: Sequence[End]) -> tuple[State, str | None]:
    """How a job that is in no queue ended without a manifest: the worst that befell one of its elements counts."""
    last = {end.element: end.code for end in ends}
    found: dict[State, str | None] = {}
    for task in tasks:
        code = last.pop(task.id, DONE)
        if task.state == "CANCELLED":
            found.setdefault("cancelled", task.reason if task.reason == "DependencyNeverSatisfied" else None)
        elif task.state != "COMPLETED":  # of segments those that left the rest to the next are COMPLETED
            found.setdefault(*_verdict(code, task.state))
    for code in last.values():
        found.setdefault(*_verdict(code, ""))
    order: tuple[State, ...] = ("failed", "stopped", "cancelled")
    for state in order:
        if state in found:
            return state, found[state]
    if ends or tasks:
        return "stopped", None
    return ("failed", "ended without a word") if _signs(folder) > _submitted(folder) else ("cancelled", "never started")


def _verdict(code: int | None, slurm: str) -> tuple[State, str | None]:
    """What an exit code in `ends` and Slurm's state say about an element; without a code it is `DONE`."""
    if code is None:
        return "cancelled", None
    if code == STOPPED or not (code or slurm):
        return "stopped", None
    told = slurm if slurm not in ("", "FAILED") else f"exit code {code}" if code else None
    return "failed", told


def _unasked(folder: Path, ends: Sequence[End], why: str) -> tuple[State, str | None]:
    """How a job of a scheduler that does not answer stands, by its folder."""
    signs = _signs(folder)
    if signs > (ends[-1].time + 1 if ends else _submitted(folder)):
        return ("running", None) if time.time() - signs < QUIET else ("stopped", f"silent; {why}")
    return _ended(folder, (), ends) if ends else ("queued", why)


def _ended_here(folder: Path, launching: bool) -> tuple[State, str | None]:
    """How a job without a scheduler's id stands, when no launch is at it; perhaps one is at others."""
    ends = read_ends(folder, "local")
    if ends:
        return _verdict(ends[-1].code, "")
    return ("stopped", None) if begun(folder) or _signs(folder) else ("waiting", None if launching else NOT_LAUNCHED)


def _submitted(folder: Path) -> float:
    """When the job was submitted, seconds since 1970."""
    try:
        return (folder / "submit.sbatch").stat().st_mtime
    except OSError:
        return 0.0


def _signs(folder: Path) -> float:
    """Time of the newest log line, metric or heartbeat; 0: none."""
    found = [folder / "metrics.jsonl", *(folder / "logs").glob("*.log"), *(folder / "heartbeats").glob("rank-*.json")]
    return max((_written(path) for path in found), default=0.0)


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _progress(row: JobStatus, folder: Path, pieces: Sequence[str]) -> JobStatus:
    """`row` with what metrics, ledger and checkpoints say."""
    record, now = last_record(folder), time.time()
    side_by_side = row.id is not None and len(pieces) > 1  # each element counts for itself in metrics.jsonl
    if pieces and (side_by_side or not record):
        made = sum((folder / "pieces" / f"{piece}.json").exists() for piece in pieces)
        record = {key: value for key, value in record.items() if key != "pace"} | {"step": made, "total": len(pieces)}
    checkpoint = _written(folder / "checkpoints" / "latest")
    productive = ledger.goodput(folder) if (folder / ledger.NAME).exists() else None
    return replace(
        row,
        step=record.get("step"),
        total=record.get("total"),
        loss=loss_of(record),
        tokens_per_s=speed_of(record),
        step_age_s=round(now - record["time"], 1) if "time" in record else None,
        checkpoint_age_s=round(now - checkpoint, 1) if checkpoint else None,
        restarts=_restarts(folder, row.id),
        eta_s=seconds_left(record) if row.state == "running" else None,
        goodput=round(productive, 4) if productive else None,
    )


def _restarts(folder: Path, id: str | None) -> int | None:
    """Of a training, by its ledger; of another job, what Slurm counted when its starts ended."""
    if (folder / ledger.NAME).exists():
        return ledger.restarts(folder)
    ends = read_ends(folder, id) if id else []
    return max(end.restarts for end in ends) if ends else None


def held(lock: Path) -> tuple[int, str] | None:
    """Process id and host of the launch that holds a run, or None; (0, "") where the lock does not say."""
    import fcntl

    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may ask too
    except BlockingIOError:
        words = os.pread(descriptor, 100, 0).decode(errors="replace").split()
        return (int(words[0]), words[1]) if len(words) == 2 and words[0].isdigit() else (0, "")
    except OSError:  # a file system without locks: nobody can hold one
        return None
    finally:
        os.close(descriptor)
    return None
