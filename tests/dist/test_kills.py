"""SIGKILL at any moment, during saves too, costs what was done since the last checkpoint and nothing else."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from ranks import ROOT
from train_support import TOKENS_PER_STEP, make_run, metrics, training_job, weights

from xlstm_distill.contract.job import JobFolder
from xlstm_distill.runtime.metrics import read_metrics
from xlstm_distill.train import checkpoint

pytestmark = pytest.mark.dist
STEPS_PER_LIFE = 10
MORE_SAVES = 3
"""Checkpoints at most that a process finishes before its kill is sought: slow machines get on too."""
LIFE = 0.2
"""Seconds until the kill at most, from then on."""
DURING_A_SAVE = 0.004
"""Seconds at most, from when a folder that is being written was seen."""


def start(folder: JobFolder) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = (folder.path / "log").open("ab")
    return subprocess.Popen([sys.executable, "-m", "xlstm_distill", folder.path], env=environment, stderr=log)


def finish(folder: JobFolder) -> None:
    assert start(folder).wait(timeout=1800) == 0, (folder.path / "log").read_text()[-3000:]


@dataclass
class Killer:
    """Starts a job and kills it, again and again."""

    folder: JobFolder
    chance: random.Random
    steps: list[int] = field(default_factory=lambda: [0])
    """Of the checkpoint that stood after each kill."""
    kills: int = 0
    during_saves: int = 0

    def kill(self, during_save: bool) -> None:
        born, saves = time.time(), self.chance.randint(0, MORE_SAVES)
        process = start(self.folder)
        if saves:
            self._until(process, lambda: self._saved() >= self.steps[-1] + saves)
        else:
            self._until(process, lambda: self._stepped_since(born))
        if during_save:
            self._until(process, lambda: self._writing_since(born))
            time.sleep(self.chance.uniform(0, DURING_A_SAVE))
        else:
            time.sleep(self.chance.uniform(0, LIFE))
        assert process.poll() is None, "the job ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.kills += 1
        self.during_saves += self._writing_since(born)
        self._check()

    def _check(self) -> None:
        """Every folder with a checkpoint's name is whole, and `latest` never goes back."""
        for path in self.folder.checkpoints.glob("step-*"):
            assert checkpoint.read_state(path)["step"] == int(path.name.removeprefix("step-"))
        assert self._saved() >= self.steps[-1]
        assert not self._saved() or checkpoint.latest(self.folder.checkpoints).is_dir()
        self.steps.append(self._saved())

    def _until(self, process: "subprocess.Popen[bytes]", condition) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert process.poll() is None, (self.folder.path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def _saved(self) -> int:
        newest = checkpoint.latest(self.folder.checkpoints)
        return int(newest.name.removeprefix("step-")) if newest else 0

    def _stepped_since(self, born: float) -> bool:
        records = read_metrics(self.folder.path)
        return bool(records) and records[-1]["time"] > born and records[-1]["step"] > self.steps[-1]

    def _writing_since(self, born: float) -> bool:
        """What earlier kills left does not count."""
        with suppress(FileNotFoundError):
            return any(path.stat().st_mtime > born for path in self.folder.checkpoints.glob(".step-*.tmp"))
        return False


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.soak)])
def test_a_training_that_is_killed_again_and_again_ends_with_the_student_of_an_unbroken_one(tmp_path, kills):
    jobs = make_run(tmp_path)
    plan = {"tokens": STEPS_PER_LIFE * kills * TOKENS_PER_STEP, "validate_every": 25}
    whole = training_job(jobs, "whole", "distill", **plan, checkpoint_every=1000)
    broken = training_job(jobs, "broken", "distill", **plan, checkpoint_every=1)
    killer = Killer(broken, random.Random(kills))
    while killer.kills < kills or killer.during_saves < kills // 3:
        killer.kill(during_save=killer.kills % 2 == 1)
        assert killer.kills < 2 * kills, "kills during saves were too rare"
    assert killer.steps[-1] > kills // 3
    finish(broken)
    finish(whole)
    print(f"{killer.kills} kills, {killer.during_saves} of them during saves; at steps {killer.steps}")
    one, two = weights(whole), weights(broken)
    assert one.keys() == two.keys()
    assert [name for name in one if not one[name].equal(two[name])] == []
    assert metrics(whole) == metrics(broken)
