"""Jobs on this machine, in the foreground and one after another, in the same folders as on a cluster.

The ranks live in a session of their own, so that Ctrl-C reaches the launcher only: it asks them to stop by the job's
`stop` file and waits for their checkpoint. They are told to stop too when the launcher dies.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launcher.checks import ranks_of
from launcher.plan import Graph, as_recorded
from launcher.progress import Display, display, last_record
from xlstm_distill.contract.exitcode import DONE, MISTAKE, STOPPED, Mistake
from xlstm_distill.contract.job import Job, JobFolder
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.state import prepare, state_of

POLL = 0.1
"""Seconds between looks at a running job."""
PR_SET_PDEATHSIG = 1
LAST_LINES = 15
"""Lines of a failed job's log that are shown."""


class Interrupt:
    """Counts Ctrl-C and TERM while jobs run: the first asks for a checkpoint, the second does not wait for it."""

    def __init__(self) -> None:
        self.count = 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    @contextmanager
    def installed(self) -> Iterator["Interrupt"]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(graph: Graph, config: Config, folder: Path, lock: int, command: str) -> int:
    """Run what is not done of `graph` and return the exit code.

    Args:
        graph: jobs, inputs first.
        config: the whole configuration.
        folder: the run folder.
        lock: descriptor of the run's lock; the jobs inherit it.
        command: what the user typed, to say how to go on.

    Raises:
        Mistake: an input is missing, or a folder holds a job of other settings.
    """
    with Interrupt().installed() as interrupt, display() as shown:
        for job in graph:
            if interrupt.count:
                shown.say(f"stopped; go on with: {command}")
                return STOPPED
            code = _run_one(JobFolder(folder / "jobs" / job.name, job, config), lock, interrupt, shown)
            if code == STOPPED:
                shown.say(f"stopped, the checkpoint is written; go on with: {command}")
            if code != DONE:
                return code
    return DONE


def _run_one(wanted: JobFolder, lock: int, interrupt: Interrupt, shown: Display) -> int:
    if state_of(wanted.path, wanted.job).done:
        return DONE
    job = as_recorded(wanted.job, wanted.path)
    folder = JobFolder(wanted.path, job, wanted.config if job == wanted.job else JobFolder.read(wanted.path).config)
    prepare(folder.path, folder.job)
    folder.write()
    folder.stop_file.unlink(missing_ok=True)
    shown.begin(job.name)
    log = folder.logs / ("rank-0.log" if ranks_of(job.placement) == 1 else "launch.log")
    begins = log.stat().st_size if log.exists() else 0
    code = _wait(start(folder, log, lock), folder, interrupt, shown)
    with (folder.path / "ends").open("a", encoding="utf-8") as ends:  # as the batch scripts do
        ends.write(f"local 0 {time.time():.3f} {code}\n")
    if code == DONE and not state_of(folder.path, job).done:
        shown.end("ended without a manifest")
        raise Mistake(f"{job.name}: ended well but wrote no valid manifest; see {log}")
    shown.end({DONE: "done", STOPPED: "stopped"}.get(code, f"failed (exit code {code})"))
    if code not in (DONE, STOPPED):
        shown.say(failure(folder, code, begins))
    return code


def command_of(folder: JobFolder) -> list[str]:
    """The command line of a job on this machine."""
    ranks = ranks_of(folder.job.placement)
    if ranks == 1:
        return [sys.executable, "-m", "xlstm_distill", str(folder.path)]
    return [sys.executable, "-m", "xlstm_distill.runtime.elastic", str(ranks), str(folder.path)]


def environment(job: Job, config: Config) -> dict[str, str]:
    """The variables that a job's ranks get on top of the launcher's."""
    package = Path(sys.modules["xlstm_distill"].__path__[0]).parent
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = config.strategy.threads or max(1, len(os.sched_getaffinity(0)) // ranks_of(job.placement))
    variables = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if job.stage != "fetch":
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if ranks_of(job.placement) == 1:
        variables |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return variables


def start(folder: JobFolder, log: Path, lock: int) -> "subprocess.Popen[bytes]":
    """Start a job's ranks in their own session, output into `log` (of more ranks: into `rank-R.log` beside it)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, **environment(folder.job, folder.config)}
    variables.pop("XDL_LOGS", None)
    if ranks_of(folder.job.placement) > 1:
        variables["XDL_LOGS"] = str(folder.logs)
    with log.open("ab") as file:
        return subprocess.Popen(
            command_of(folder),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
            pass_fds=[lock],
            preexec_fn=_die_with(os.getpid()),
        )


def _die_with(parent: int) -> Callable[[], None]:
    """What the child does before it becomes the job: ask Linux for a TERM when the launcher dies."""
    libc = ctypes.CDLL(None)

    def set_signal() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(STOPPED)

    return set_signal


def _wait(process: "subprocess.Popen[bytes]", folder: JobFolder, interrupt: Interrupt, shown: Display) -> int:
    asked = 0
    while process.poll() is None:
        time.sleep(POLL)
        shown.update(last_record(folder.path))
        if interrupt.count and not asked:
            folder.stop_file.touch()
            shown.say("stopping: waiting for the checkpoint (once more to end at once, without one)")
        if interrupt.count > max(1, asked):
            shown.say("ended at once; the steps since the last checkpoint will be done again")
            os.killpg(process.pid, signal.SIGKILL)
        asked = interrupt.count
    folder.stop_file.unlink(missing_ok=True)
    shown.update(last_record(folder.path))
    code = process.returncode
    return 128 - code if code < 0 else code


def failure(folder: JobFolder, code: int, begins: int = 0) -> str:
    """The last lines that a failed job wrote, and where the rest is; of a user's mistake its one line."""
    logs = sorted(folder.logs.glob("rank-*.log"), key=lambda path: path.stat().st_mtime) or sorted(
        folder.logs.glob("*.log")
    )
    if not logs:
        return f"{folder.job.name}: no log in {folder.logs}"
    with logs[-1].open("rb") as file:
        file.seek(begins if logs[-1].name == "rank-0.log" and begins <= logs[-1].stat().st_size else 0)
        lines = file.read().decode(errors="replace").splitlines()
    if code == MISTAKE and (told := [line for line in lines if line.startswith("error: ")]):
        return told[-1]
    return "\n".join([*lines[-LAST_LINES:], f"{folder.job.name} failed with exit code {code}; its log: {logs[-1]}"])


def quoted(command: Sequence[str]) -> str:
    """A command line as one types it."""
    return shlex.join(command)
