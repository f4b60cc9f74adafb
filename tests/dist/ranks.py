"""The ranks of jobs as processes of a test, with no launcher between: each can be signalled and killed for real."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from ports import free_ports

from xlstm_distill.contract.job import JobFolder

ROOT = Path(__file__).parents[2]
FIRST_PORT = 10_000
# Several jobs in one process, one after another, because a start costs more than a job: each with its own rendezvous.
JOBS = """
import os, sys
from xlstm_distill.stages import main
for pair in sys.argv[1:]:
    os.environ["MASTER_PORT"], job = pair.split("=", 1)
    if code := main([job]):
        os._exit(code)
"""


def free_port() -> int:
    """One that nobody listens on."""
    return free_ports(1, FIRST_PORT)[0]


class Ranks:
    """`world` processes that run `arguments` of python; `node`: ranks per (pretended) node, 0: all on one.

    Their output goes to `folder`/rank-N.log; `path` is put before PYTHONPATH.
    """

    def __init__(
        self, arguments: list[str], world: int, folder: Path, *, node: int = 0, path: Path | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        node = node or world
        common = {
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(node), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "PYTHONPATH": f"{path}:{ROOT}" if path else str(ROOT),
        }  # fmt: skip
        with ExitStack() as files:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank % node)},
                    stdout=files.enter_context(log.open("a")),
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for rank, log in enumerate(self.logs)
            ]

    def wait(self, code: int = 0, seconds: float = 240) -> str:
        """Until all have ended with `code`; returns what they said last. Anything else is an error and ends them."""
        try:
            self.until(lambda: all(p.poll() is not None for p in self.processes), seconds, code)
        finally:
            self.kill()
        return self.said()

    def until(self, condition: Callable[[], object], seconds: float = 240, code: int = 0) -> None:
        """Wait for `condition`; a rank that ends otherwise than with `code` meanwhile is an error."""
        deadline = time.monotonic() + seconds
        while not condition():
            codes = [process.poll() for process in self.processes]
            if any(found not in (None, code) for found in codes) or time.monotonic() > deadline:
                time.sleep(1)
                self.kill()
                raise AssertionError(f"exit codes {codes}\n{self.said()}")
            time.sleep(0.01)
        assert all(p.poll() in (None, code) for p in self.processes), self.said()

    def kill(self) -> None:
        """SIGKILL those that live."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def said(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in self.logs)


def start(jobs: list[JobFolder], world: int, *, node: int = 0, path: Path | None = None) -> Ranks:
    """Run jobs one after another on the same ranks."""
    pairs = [f"{port}={job.path}" for port, job in zip(free_ports(len(jobs), FIRST_PORT), jobs, strict=True)]
    return Ranks(["-c", JOBS, *pairs], world, jobs[-1].path / "logs", node=node, path=path)


def spread(jobs: list[JobFolder], world: int, code: int = 0, seconds: float = 240, **options: object) -> str:
    """The same, to their end; returns what the ranks said."""
    return start(jobs, world, **options).wait(code, seconds * len(jobs))  # type: ignore[arg-type]
