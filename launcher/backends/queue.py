"""Jobs of a run in Slurm's queue: which there are, taking them out, telling them whom to wait for."""

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.reconcile import PENDING, RUNNING
from launcher.runs import read_graph, record_id
from launcher.scheduler import PATIENT_SECONDS, Sight, Task, look
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import Job

LEAVING_SECONDS = 120.0
"""For jobs to leave the queue: Slurm sends TERM, and KILL after the site's KillWait (30 s by default)."""
LOOK_SECONDS = 0.3
LEAVING = "COMPLETING"


@dataclass(frozen=True)
class Queue:
    """Jobs of a run that are in the queue, by name."""

    ids: dict[str, str]
    """The scheduler's."""
    states: dict[str, str]
    """`PENDING`, `RUNNING` (of an array: any element), or `COMPLETING`: it ends, nothing can be asked of it."""
    failed: dict[str, list[str]]
    """Elements (`12_3`) that have failed, of arrays over pieces that are still in the queue."""

    def without(self, names: Iterable[str]) -> "Queue":
        """The queue after these have left it."""
        gone = set(names)
        kept = lambda found: {name: value for name, value in found.items() if name not in gone}  # noqa: E731
        return Queue(kept(self.ids), kept(self.states), self.failed)


def script_path(folder: Path, job: str) -> Path:
    """Where the script of a job of the run `folder` is written."""
    return folder / "jobs" / job / "submit.sbatch"


def in_the_queue(folder: Path) -> Queue:
    """The jobs of a run that are in the queue, by the ids in `graph.json`.

    Raises:
        Mistake: squeue does not answer.
    """
    jobs = {name: job for name, job in read_graph(folder).get("jobs", {}).items() if job.get("id")}
    sight = _sight(job["id"] for job in jobs.values())
    states = {name: state for name, job in jobs.items() if (state := _state(sight.of(job["id"])))}
    return Queue({name: jobs[name]["id"] for name in states}, states, _failed(sight, jobs, states))


def _failed(sight: Sight, jobs: Mapping[str, Any], alive: Iterable[str]) -> dict[str, list[str]]:
    """Time segments go on where one failed; elements with pieces of their own do not."""
    found = {}
    for name in (name for name in alive if len(jobs[name].get("pieces", ())) > 1):
        tasks = (task for task in sight.of(jobs[name]["id"]) if task.ended and task.state != "COMPLETED")
        found[name] = [task.id for task in tasks]
    return {name: ids for name, ids in found.items() if ids}


def _sight(ids: Iterable[str]) -> Sight:
    sight = look(ids, PATIENT_SECONDS)
    if not sight.answered:
        raise Mistake(f"the queue: {sight.why}; launch again when it answers")
    return sight


def _state(tasks: Sequence[Task]) -> str:
    """`PENDING`, `RUNNING`, `COMPLETING`, or empty for a job that is not in the queue."""
    alive = [task for task in tasks if not task.ended]
    if not alive:
        return ""
    if all(task.waits for task in alive):
        return PENDING
    return LEAVING if all(task.state == LEAVING for task in alive) else RUNNING


def queued(ids: Iterable[str]) -> set[str]:
    """Which of these scheduler ids are still in the queue."""
    wanted = set(ids)
    sight = _sight(wanted)
    return {id for id in wanted if _state(sight.of(id))}


def adopt(folder: Path, names: Iterable[str]) -> None:
    """Remember the ids of jobs whose submission was cut off before its id could be written down, or whose `sbatch` gave
    up waiting for an answer: the queue knows them by the path of their script."""
    scripts = {str(script_path(folder, name)): name for name in names}
    by_submitit = {str(folder / "jobs" / name / "submitit"): name for name in names}
    known = {job.get("id") for job in read_graph(folder).get("jobs", {}).values()}
    for line in call(["squeue", "-h", "-a", "--me", "-o", "%F|%o"], "the queue").splitlines():
        id, _, script = line.partition("|")
        name = scripts.get(script) or by_submitit.get(str(Path(script).parent))
        if name and id not in known:
            record_id(folder, name, id)
            known.add(id)


def cancel(ids: Mapping[str, str], names: Sequence[str]) -> None:
    """Cancel jobs of the queue, in one call."""
    if names:
        call(["scancel", *(ids[name] for name in names)], ", ".join(names))
        print(f"cancelled: {', '.join(names)}", flush=True)


def until_gone(ids: Iterable[str], what: str) -> None:
    """Wait until these have left the queue, so that nobody writes in their folders.

    Raises:
        Mistake: they do not.
    """
    wanted = set(ids)
    _until_nobody(lambda: what if queued(wanted) else "")


def until_left(folder: Path) -> Queue:
    """The queue of a run when nothing in it is about to leave: jobs that were told to stop by their `stop` file are
    waited for, and those that end; one that is requeued then waits there again.

    Raises:
        Mistake: they do not leave, or squeue does not answer.
    """
    queue = Queue({}, {}, {})

    def leaving() -> str:
        nonlocal queue
        queue = in_the_queue(folder)
        return ", ".join(name for name, state in queue.states.items() if _leaves(state, folder / "jobs" / name))

    _until_nobody(leaving)
    return queue


def _until_nobody(still_there: Callable[[], str]) -> None:
    """Look until nobody is named."""
    deadline, told = time.monotonic() + LEAVING_SECONDS, False
    while who := still_there():
        if time.monotonic() > deadline:
            raise Mistake(f"{who}: still in the queue; launch again when it has left")
        if not told:
            print(f"{who}: waiting until it has left the queue …", flush=True)
            told = True
        time.sleep(LOOK_SECONDS)


def _leaves(state: str, job: Path) -> bool:
    return state == LEAVING or (state == RUNNING and (job / "stop").exists())


def withdraw(folder: Path, jobs: Sequence[Job], names: Iterable[str]) -> None:
    """Cancel these jobs of a run and those that wait for them in the queue, and wait until they have left it.

    Args:
        folder: of the run.
        jobs: all, inputs first.
        names: whom.
    """
    queue, wanted = in_the_queue(folder), set(names)
    for job in jobs:
        if queue.states.get(job.name) == PENDING and wanted & set(job.inputs):
            wanted.add(job.name)  # or merge, which waits for the end of its experts, would begin
    found = [job.name for job in reversed(jobs) if job.name in wanted and job.name in queue.ids]
    cancel(queue.ids, found)
    until_gone((queue.ids[name] for name in found), ", ".join(found))


def call(command: Sequence[str], about: str) -> str:
    """Run one of Slurm's commands; what it printed.

    Raises:
        Mistake: it fails; its answer is in the message.
    """
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    if answer.returncode:
        raise Mistake(f"{about}: {command[0]} refuses it: {' '.join(answer.stderr.split())}")
    return answer.stdout


def clean_environment() -> dict[str, str]:
    """This environment without what a surrounding job or the user's defaults would add to Slurm's commands."""
    foreign = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_")
    return {k: v for k, v in os.environ.items() if not k.startswith(foreign) or k == "SLURM_CONF"}
