"""One of two ranks is stopped or stuck, for real: it is named with step and stack, and both are gone T + 10 s later."""

import json
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import ROOT, Ranks
from train_support import TOKENS_PER_STEP, make_run, metrics, training_job

from xlstm_distill.contract.exitcode import STUCK

pytestmark = pytest.mark.dist
T, T_TRAINING = 6, 10
"""Seconds; a first step is slow."""
LOOP = """
import ctypes, os, signal, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from xlstm_distill.contract.job import World
from xlstm_distill.runtime.pace import Pace
from xlstm_distill.runtime.watchdog import Watchdog, flight_recorder

folder, how, victim, stuck_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), 20
world = World.from_environment()
flight_recorder(folder / "logs")

def deadlock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # never released

def stuck_read():
    (folder / "fifo").open("rb").read()

def stuck_in_c():
    ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock

def going_on():
    pass

pace = Pace(world)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
with Watchdog(folder, world, float(sys.argv[4])) as watchdog:
    for step in range(200 if how == "finish" else 10**6):
        watchdog.beat(step, "data")
        if step == stuck_at and world.rank == victim:
            globals().get(how, going_on)()
        watchdog.beat(step, "forward")
        if how == "stopped_in_a_save" and step == stuck_at:
            watchdog.beat(step, "checkpoint", 600)
            if world.rank == victim:
                os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
        time.sleep(0.02)
        if slow := pace.step(0.3 if world.rank == victim else 0.1, 1.0):
            print(slow, flush=True)
"""
STEP_20_OF_DATA = "at step 20, data"


@pytest.fixture
def loop(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP)
    os.mkfifo(tmp_path / "fifo")
    started = []

    def start(how: str, victim: int) -> Ranks:
        started.append(
            Ranks([str(tmp_path / "loop.py"), str(tmp_path), how, str(victim), str(T)], 2, tmp_path / "logs")
        )
        return started[0]

    yield start
    started[0].kill()


@pytest.fixture(scope="module")
def run_of_jobs(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def step_of(folder: Path, rank: int) -> int:
    path = folder / f"heartbeats/rank-{rank}.json"
    return json.loads(path.read_text())["step"] if path.exists() else -1


def wait_until_gone(ranks: Ranks, since: float) -> list[int]:
    """Exit codes, when all have ended within T + 10 s."""
    while any(process.poll() is None for process in ranks.processes):
        assert time.monotonic() - since < T + 10, ranks.said()
        time.sleep(0.02)
    return [process.returncode for process in ranks.processes]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank(loop, tmp_path, victim):
    ranks = loop("stop", victim)
    ranks.until(lambda: min(step_of(tmp_path, rank) for rank in (0, 1)) > 5)
    os.kill(ranks.processes[victim].pid, signal.SIGSTOP)
    codes = wait_until_gone(ranks, time.monotonic())
    assert codes[victim] in (-signal.SIGABRT, -signal.SIGKILL)
    assert codes[1 - victim] == STUCK
    said = ranks.logs[1 - victim].read_text()
    pid = ranks.processes[victim].pid
    assert re.search(rf"rank {victim} \(host \S+, pid {pid}\) is stuck at step \d+, \w+, for \d", said), said
    assert "its process does not run" in said
    assert 'loop.py", line' in said
    assert f"rank {1 - victim} (host" not in said


def test_a_rank_that_is_stopped_while_the_others_wait_for_a_save(loop, tmp_path):
    """Which may last long, but not for a process that does not run."""
    ranks = loop("stopped_in_a_save", 1)
    ranks.until(lambda: step_of(tmp_path, 0) == 20)
    codes = wait_until_gone(ranks, time.monotonic())
    assert (codes[0], codes[1]) in ((STUCK, -signal.SIGABRT), (STUCK, -signal.SIGKILL))
    said = ranks.logs[0].read_text()
    assert re.search(r"rank 1 \(host \S+, pid \d+\) is stuck at step \d+, \w+", said), said
    assert "its process does not run" in said


@pytest.mark.parametrize(
    ("how", "line"), [("deadlock", "lock.acquire()  # never released"), ("stuck_read", '(folder / "fifo").open("rb")')]
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_in_a_deadlock_or_a_read_that_never_ends(loop, tmp_path, how, line, victim):
    ranks = loop(how, victim)
    ranks.until(lambda: step_of(tmp_path, victim) == 20)
    codes = wait_until_gone(ranks, time.monotonic())
    assert codes[victim] == STUCK
    assert codes[1 - victim] in (STUCK, 1)
    for log in ranks.logs:  # the others say it as well
        said = log.read_text()
        assert f"rank {victim} (host" in said
        assert f"rank {1 - victim} (host" not in said
        assert STEP_20_OF_DATA in said
        assert line in said
    own = ranks.logs[victim].read_text()
    assert "Current thread" in own  # faulthandler's: all threads
    assert "(most recent call first)" in own


def test_a_rank_that_holds_the_interpreters_lock(loop, tmp_path):
    """Neither its main thread nor its watchdog can run: a timer in C or the other's SIGABRT shows the stack."""
    ranks = loop("stuck_in_c", 1)
    ranks.until(lambda: step_of(tmp_path, 0) == 20)
    codes = wait_until_gone(ranks, time.monotonic())
    assert codes[0] in (STUCK, 1)
    assert "rank 1 (host" in ranks.logs[0].read_text()
    assert "its process does not run" in ranks.logs[0].read_text()
    assert codes[1] in (1, -signal.SIGABRT)
    assert "in stuck_in_c" in ranks.logs[1].read_text()


def test_what_torch_recorded_of_the_last_collectives_is_kept(loop, tmp_path):
    ranks = loop("deadlock", 1)
    ranks.until(lambda: step_of(tmp_path, 1) == 20)
    wait_until_gone(ranks, time.monotonic())
    for rank in (0, 1):
        entries = pickle.loads((tmp_path / f"logs/collectives-{rank}").read_bytes())["entries"]
        assert [e["profiling_name"] for e in entries].count(
            "gloo:all_reduce"
        ) == 21 - rank  # the other waits in its 21st


def test_ranks_that_go_on_are_left_alone_and_leave_no_files_and_a_slow_one_is_named(loop, tmp_path):
    said = loop("finish", 1).wait(0)
    line = f"rank 1 (host {platform.node()}) is slow: data 3.0× the median of the others (0.30 s per step)"
    assert said.count(line) == 4  # on both ranks, at steps 20 and 120
    assert not list((tmp_path / "heartbeats").iterdir())


def test_a_training_whose_first_rank_was_stopped_ends_and_goes_on_to_its_end(run_of_jobs):
    """As a local launch runs it, through torch's elastic launch."""
    victim = 0
    settings = {"tokens": 200 * TOKENS_PER_STEP, "validate_every": 0, "checkpoint_every": 5}
    folder = training_job(run_of_jobs, "stopped", "distill", **settings)
    guard = replace(folder.config.guard, stuck_seconds=T_TRAINING)
    replace(folder, config=replace(folder.config, guard=guard)).write()
    command = [sys.executable, "-m", "xlstm_distill.runtime.elastic", "2", str(folder.path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDL_LOGS": str(folder.logs)}
    launched = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    latest = folder.checkpoints / "latest"
    while not latest.exists() or min(step_of(folder.path, rank) for rank in (0, 1)) < 10:
        assert launched.poll() is None, (folder.logs / "rank-0.log").read_text()
        time.sleep(0.02)
    beat = json.loads((folder.path / f"heartbeats/rank-{victim}.json").read_text())
    os.kill(beat["pid"], signal.SIGSTOP)
    stopped = time.monotonic()
    assert launched.wait(T_TRAINING + 10) not in (0, 2, 75)
    assert time.monotonic() - stopped < T_TRAINING + 10
    assert not Path(f"/proc/{beat['pid']}").exists()
    said = (folder.logs / f"rank-{1 - victim}.log").read_text()
    assert re.search(rf"rank {victim} \(host \S+, pid {beat['pid']}\) is stuck at step \d+, \w+", said), said
    assert "xlstm_distill/train/loop.py" in said
    saved = int(latest.read_text().removeprefix("step-"))
    assert saved >= 5
    folder.write()  # with the usual T
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, timeout=240, check=False).returncode == 0
    assert [record["step"] for record in metrics(folder)] == list(range(201))
