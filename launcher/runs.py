"""The run folder: where it is, what `xdl launch` writes into it, and who may launch in it.

runs/NAME/  config.yaml  graph.json (jobs, edges, scheduler ids)  lock  code/HASH/ (Slurm)  jobs/JOB/ (contract/job.py)
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.plan import Graph
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_atomic, write_json, yaml_text
from xlstm_distill.contract.job import plain
from xlstm_distill.contract.schema import Config

ORPHAN_WAIT = 300.0
"""Seconds that a new launch waits for the last job of one that was killed: it is writing its checkpoint."""
ASKED_WAIT = 1.0
"""Seconds of that in which `status` may hold the lock, to see whether anybody does."""


def run_name(config: Config) -> str:
    """The run's name: given, or the teacher's, so that the same command finds its run again."""
    return config.name or config.teacher.name


def run_folder(config: Config) -> Path:
    """Absolute folder of the run."""
    return Path(config.runs).expanduser().absolute() / run_name(config)


def find_run(run: str, runs: str = "runs") -> Path:
    """The folder of an existing run, by its name below `runs` or by its path.

    Raises:
        Mistake: there is none.
    """
    for folder in (Path(runs) / run, Path(run)):
        if run and (folder / "graph.json").is_file():
            return folder.absolute()
    known = [folder.parent.name for folder in sorted(Path(runs).glob("*/graph.json"))]
    raise Mistake(
        f"{run}: no such run in {Path(runs).absolute()}; {'there are ' + ', '.join(known) if known else 'it has none'}"
    )


def find_student(text: str, runs: str = "runs") -> str:
    """`RUN[:MODEL]` as `FOLDER:MODEL`; no model: empty.

    Raises:
        Mistake: there is no such run.
    """
    run, colon, model = text.rpartition(":")
    return f"{find_run(run, runs)}:{model}" if colon else f"{find_run(text, runs)}:"


def write_run(folder: Path, config: Config, graph: Graph) -> None:
    """Write `config.yaml` and `graph.json`; scheduler ids and jobs that `graph.json` knew already stay."""
    write_atomic(folder / "config.yaml", yaml_text(plain(asdict(config))))
    before = read_graph(folder)
    jobs = {**before.get("jobs", {}), **{job.name: _described(job, before) for job in graph}}
    edges = [[name, job] for job, known in jobs.items() for name in known["inputs"] if name in jobs]
    write_json(folder / "graph.json", {"jobs": jobs, "edges": edges})


def _described(job: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    described = {key: plain(getattr(job, key)) for key in ("stage", "inputs", "pieces", "tokens")}
    described["placement"] = plain(asdict(job.placement))
    known = before.get("jobs", {}).get(job.name, {})
    return {**described, **{key: known[key] for key in ("id",) if key in known}}


def read_graph(folder: Path) -> dict[str, Any]:
    """`graph.json`, or an empty graph where there is none."""
    try:
        return dict(json.loads((folder / "graph.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Mistake(f"{folder}/graph.json: not JSON; remove it and launch again") from error


def record_id(folder: Path, job: str, scheduler_id: str) -> None:
    """Remember the scheduler's id of a job in `graph.json`."""
    graph = read_graph(folder)
    graph["jobs"][job]["id"] = scheduler_id
    write_json(folder / "graph.json", graph)


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = print) -> Iterator[int]:
    """Hold the run for one launch; yields the lock's descriptor, which the jobs inherit.

    The kernel frees the lock with the last process that holds it, so a lock cannot go stale. Where its launch was
    killed but its job still lives, wait for that job: it was told to stop when its launch died.

    Raises:
        Mistake: another launch is alive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        began = time.monotonic()
        waiting = False
        while not _take(descriptor, folder):
            owner = os.pread(descriptor, 100, 0).decode(errors="replace").split()
            pid = int(owner[0]) if owner and owner[0].isdigit() else 0
            if _alive(pid) or time.monotonic() > began + ORPHAN_WAIT:
                who = f"process {pid} on {owner[1]}" if len(owner) > 1 else "another process"
                raise Mistake(f"{folder}: {who} is launching this run; wait for it, stop it, or give --name NEW")
            if not waiting and time.monotonic() > began + ASKED_WAIT:
                say("an earlier launch was killed; waiting for its job to write a checkpoint …")
                waiting = True
            time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {os.uname().nodename}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Lustre without its mount option flock
        raise Mistake(
            f"{folder}: its file system cannot lock files ({error.strerror}); choose another runs="
        ) from error
    return True


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _zombie(pid)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
