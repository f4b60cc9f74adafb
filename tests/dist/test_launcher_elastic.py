"""A job with two ranks on this machine: torch's elastic launch, stopped together, with the ranks' own exit code."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from launcher.backends import local
from launcher.compose import compose
from launcher.plan import plan
from launcher.runs import locked
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.schema import Placement

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
PATCH = "import xlstm_distill.stages as s; s.STAGES['fetch'] = 'two_ranks:run'\n"
STAGE = """
import os, signal, time
import torch.distributed as dist
from xlstm_distill.contract.exitcode import Mistake, Stopped

def run(folder, world, stop):
    print(f"rank {world.rank} of {world.size}", flush=True)
    mode = os.environ["TWO_RANKS"]
    if mode == "mistake":
        raise Mistake("both ranks see it")
    if mode == "crash" and world.rank == 1:
        os._exit(41)
    if mode == "stopped" and world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if mode == "stopped":
        time.sleep(1)
        (folder.path / "crashed").touch()
        os._exit(41)
    if mode == "crash":
        while not stop.signalled:
            time.sleep(0.05)
        raise Stopped("told to")
    dist.init_process_group("gloo")
    while mode == "wait":
        if stop.requested():
            raise Stopped("saved")
        (folder.path / f"alive-{world.rank}").touch()
        time.sleep(0.05)
    dist.destroy_process_group()
    (folder.output / "x").write_text("x")
    return {}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFolder:
    (tmp_path / "sitecustomize.py").write_text(PATCH)
    (tmp_path / "two_ranks.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    config = compose(["stage=fetch"], {"cluster.stages.align.gpus_per_node": 2}).config
    (fetch,) = plan(config)
    folder = JobFolder(
        tmp_path / "jobs/fetch", type(fetch)(**{**vars(fetch), "placement": Placement(gpus_per_node=2)}), config
    )
    folder.write()
    return folder


def run(job: JobFolder, tmp_path: Path) -> "subprocess.Popen[bytes]":
    with locked(tmp_path / "run") as lock:
        return local.start(job, job.logs / "launch.log", lock)


def test_two_ranks_finish_the_job_each_with_its_log(
    job: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWO_RANKS", "finish")
    assert run(job, tmp_path).wait(120) == 0
    assert job.manifest_path.exists()
    for rank in (0, 1):
        assert f"rank {rank} of 2" in (job.logs / f"rank-{rank}.log").read_text()


@pytest.mark.parametrize(("mode", "code"), [("mistake", 2), ("crash", 41)])
def test_the_exit_code_is_the_first_failing_ranks(
    job: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, code: int
) -> None:
    monkeypatch.setenv("TWO_RANKS", mode)
    assert run(job, tmp_path).wait(120) == code
    if mode == "mistake":
        assert local.failure(job, code) == "error: both ranks see it"


def test_a_rank_that_cannot_hear_does_not_hold_up_the_end_of_the_others(
    job: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWO_RANKS", "stopped")
    assert run(job, tmp_path).wait(120) == 41
    assert time.time() - (job.path / "crashed").stat().st_mtime < 15


@pytest.mark.parametrize("how", ["stop file", "dead launcher"])
def test_a_stop_reaches_both_ranks(job: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("TWO_RANKS", "wait")
    process = run(job, tmp_path)
    alive = [job.path / f"alive-{rank}" for rank in (0, 1)]
    while not all(path.exists() for path in alive):
        assert process.poll() is None
        time.sleep(0.1)
    if how == "stop file":
        job.stop_file.touch()
        assert process.wait(120) == 75
    else:
        os.kill(process.pid, 15)  # what the kernel sends when the launcher dies
        process.wait(120)
        assert all("saved" in (job.logs / f"rank-{rank}.log").read_text() for rank in (0, 1))
