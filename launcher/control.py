"""`xdl cancel`, `xdl stop` and `xdl tensorboard`: what acts on the jobs of a run that was launched before."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from launcher.backends.queue import clean_environment
from launcher.monitor import run_status
from launcher.runs import find_run
from launcher.standing import CANCELLED, JobStatus, held
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import read_lines


def cancel(run: str, jobs: Sequence[str], runs: str) -> None:
    """Take jobs from the queue and end those that run, without asking for a checkpoint; of a launch on this machine,
    ask for one first.

    Args:
        run: name or path.
        jobs: names; empty: all of the run.
        runs: folder of the runs.

    Raises:
        Mistake: no such run or job, or the scheduler refuses.
    """
    folder = find_run(run, runs)
    alive = _alive(folder, jobs)
    queued = [row for row in alive if row.id]
    here = [row for row in alive if not row.id and row.state == "running"]
    if queued:
        for row in queued:
            with (folder / "jobs" / row.name / "ends").open("a", encoding="utf-8") as ends:
                ends.write(f"{row.id} 0 {time.time():.0f} {CANCELLED}\n")
        _scancel([row.id or "" for row in queued])
        for row in queued:
            print(f"{row.name}: cancelled ({row.id}, was {row.state})")
    for row in here:
        pid = _end_launch(folder)
        print(f"{row.name}: its launch (process {pid}) is told to end; it writes a checkpoint first (again: at once)")
    if not queued and not here:
        print(f"{folder.name}: nothing is queued or running{' of ' + ', '.join(jobs) if jobs else ''}")
    else:
        print(f"go on with: {_launched_by(folder)}")


def stop(run: str, jobs: Sequence[str], runs: str) -> None:
    """Ask running jobs for a checkpoint and to end then, and take those that wait from the queue.

    Args:
        run: name or path.
        jobs: names; empty: all of the run.
        runs: folder of the runs.

    Raises:
        Mistake: no such run or job, or the scheduler refuses.
    """
    folder = find_run(run, runs)
    alive = [row for row in _alive(folder, jobs) if row.id or row.state == "running"]
    for row in alive:  # also of those that wait: one may have started since
        (folder / "jobs" / row.name / "stop").touch()
    if queued := [row.id for row in alive if row.id]:
        _scancel(["--state=PENDING", *queued])
    for row in alive:
        if row.state == "running":
            print(f"{row.name}: will write a checkpoint after its step and end")
        else:
            print(f"{row.name}: cancelled ({row.id}, was {row.state}); it had not begun or waited to go on")
    if alive:
        print(f"go on with: {_launched_by(folder)}")
    else:
        print(f"{folder.name}: nothing is queued or running{' of ' + ', '.join(jobs) if jobs else ''}")


def _alive(folder: Path, jobs: Iterable[str]) -> list[JobStatus]:
    rows = run_status(folder, sure=True)
    names = [row.name for row in rows]
    for name in jobs:
        if name not in names:
            raise Mistake(f"{name}: no such job in {folder.name}; it has {', '.join(names)}")
    return [row for row in rows if row.alive and (not jobs or row.name in jobs)]


def _scancel(arguments: Sequence[str]) -> None:
    try:
        answer = subprocess.run(
            ["scancel", *arguments], capture_output=True, text=True, check=False, env=clean_environment()
        )
    except FileNotFoundError as error:
        raise Mistake("no scancel here; do this where the run was launched") from error
    if answer.returncode:
        raise Mistake(f"scancel refuses: {' '.join(answer.stderr.split())}")


def _end_launch(folder: Path) -> int:
    """Send TERM to the launch that holds the run's lock; its process id.

    Raises:
        Mistake: it is not a process of this machine.
    """
    pid, host = held(folder / "lock") or (0, "")
    if not pid or host != platform.node():
        raise Mistake(f"{folder.name}: it was launched on {host or 'another machine'}; cancel it there")
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:  # killed already: its job writes a checkpoint and ends
        pass
    except PermissionError as error:
        raise Mistake(f"{folder.name}: its launch (process {pid}) is somebody else's") from error
    return pid


def _launched_by(folder: Path) -> str:
    """The command of the run's last launch."""
    commands = [line.get("command") for line in read_lines(folder / "launches.jsonl") if isinstance(line, dict)]
    return str(commands[-1]) if commands and commands[-1] else "the same xdl launch"


def tensorboard(run: str, arguments: Sequence[str], runs: str) -> int:
    """Start TensorBoard on a run in the foreground and return its exit code.

    Args:
        run: name or path.
        arguments: for TensorBoard (`--port`, `--host`, …).
        runs: folder of the runs.

    Raises:
        Mistake: no such run, or TensorBoard is not installed.
    """
    folder = find_run(run, runs)
    if find_spec("tensorboard") is None:
        raise Mistake("tensorboard is not installed here; run: pip install tensorboard")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "jobs"), *arguments]
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
