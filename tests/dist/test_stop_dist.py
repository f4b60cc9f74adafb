"""Two ranks of a training that are asked to stop, at any moment and through any one of them, save and end with 75."""

import random
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ranks import Ranks, start
from train_support import SOURCES, TOKENS_PER_STEP, job, make_config, make_run, metrics, training_job

from xlstm_distill.contract.exitcode import DONE, STOPPED
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.train import checkpoint

pytestmark = pytest.mark.dist
STAGES = ("align", "distill")
HOW = ("USR2", "TERM", "stop file", "deadline")
SETTINGS = {"tokens": 10**6 * TOKENS_PER_STEP, "micro_batch": 1, "validate_every": 3, "checkpoint_every": 5}
MOST_SECONDS = 3.0
"""Of steps, validations and saves, before a stop."""
# In one of the ranks: a time limit that ends so many seconds after the process began.
LIMITED = """
import os, time
from xlstm_distill.runtime import stop
stop.LEAVING_SECONDS = stop.UNKNOWN_SECONDS = 0.5
if os.environ["RANK"] == "{victim}":
    os.environ["XDL_DEADLINE"] = str(time.time() + {seconds})
"""
SLOW_CAPTURE = """
import time
from xlstm_distill.teacher.capture import Capture

def slow(capture, *arguments, plain=Capture.targets):
    time.sleep(0.1)
    return plain(capture, *arguments)

Capture.targets = slow
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tied=True)


def patch(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(text)
    return folder


def until_listening(ranks: Ranks) -> None:
    """Every rank has its handler of USR2."""

    def listens(pid: int) -> bool:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return bool(int(status.get("SigCgt", "0"), 16) >> (signal.SIGUSR2 - 1) & 1)

    ranks.until(lambda: all(listens(process.pid) for process in ranks.processes))


@dataclass
class Stopper:
    """Starts two ranks and asks one of them to stop, again and again."""

    chance: random.Random
    place: Path
    starting: float = 10.0
    """Seconds of a start until the end of its first step."""

    def stop(self, folder: JobFolder, how: str) -> None:
        """At a random moment after the first step, now and then before it."""
        steps = len(metrics(folder))
        victim, after = self.chance.randrange(2), self.chance.uniform(0, MOST_SECONDS)
        began = time.monotonic()
        text = LIMITED.format(victim=victim, seconds=self.starting + after) if how == "deadline" else ""
        ranks = start([folder], 2, path=patch(self.place, text))
        if how != "deadline":
            until_listening(ranks)
            if self.chance.random() < 0.8:
                ranks.until(lambda: len(metrics(folder)) > steps)
                self.starting = time.monotonic() - began
            time.sleep(after)
            if how == "stop file":
                folder.stop_file.touch()
            else:
                ranks.processes[victim].send_signal(getattr(signal, f"SIG{how}"))
        ranks.wait(STOPPED)
        folder.stop_file.unlink(missing_ok=True)


def assert_saved_where_it_stopped(folder: JobFolder) -> int:
    """The newest checkpoint is whole, and of the last step that was logged; returns that."""
    newest = checkpoint.latest(folder.checkpoints)
    step = checkpoint.read_state(newest)["step"]  # compares every file with its hash
    logged = [record["step"] for record in metrics(folder)]
    assert step == (logged[-1] if logged else 0)
    assert logged == sorted(set(logged))
    return int(step)


def rounds(jobs: Path, name: str, count: int, stopper: Stopper) -> dict[str, list[int]]:
    """So many stops, in turn by stage and way to ask, each going on from the one before: the steps by stage."""
    folders = {stage: training_job(jobs, f"{stage} {name}", stage, **SETTINGS) for stage in STAGES}
    steps: dict[str, list[int]] = {stage: [] for stage in STAGES}
    for number in range(count):
        stage = STAGES[(number + number // 4) % 2]
        stopper.stop(folders[stage], HOW[number % 4])
        steps[stage].append(assert_saved_where_it_stopped(folders[stage]))
    assert all(found == sorted(found) for found in steps.values())
    return steps


def test_every_way_to_ask_ends_with_75_and_a_checkpoint_at_the_last_step(jobs, tmp_path):
    steps = rounds(jobs, "few", 4, Stopper(random.Random(2), tmp_path / "path"))
    assert max(map(max, steps.values())) > 0


@pytest.mark.soak
def test_a_hundred_stops_leave_a_hundred_checkpoints(jobs, tmp_path):
    steps = rounds(jobs, "many", 100, Stopper(random.Random(), tmp_path / "path"))
    assert all(len(set(found)) > 20 for found in steps.values())


@pytest.mark.parametrize("world", [1, 2])
def test_a_capture_that_is_stopped_keeps_the_finished_shards_and_goes_on(jobs, tmp_path, world):
    config = make_config(jobs.parent / "shards")
    config = replace(config, cache=replace(config.cache, micro_batch=1))
    folder = job(jobs, f"cache stopped {world}", config, "cache", inputs=("fetch",), pieces=tuple(SOURCES))
    first, second = SOURCES
    ranks = start([folder], world, path=patch(tmp_path / "path", SLOW_CAPTURE))
    ranks.until(lambda: (folder.path / f"pieces/{first}.json").exists())
    time.sleep(random.uniform(0, 0.4))
    ranks.processes[-1].send_signal(signal.SIGUSR2)
    ranks.wait(STOPPED)
    kept = (folder.path / f"pieces/{first}.json").read_bytes()
    shards = {path: path.stat().st_mtime_ns for path in folder.output.glob("*/*/*/shard*")}
    assert not (folder.path / f"pieces/{second}.json").exists()
    assert not list(folder.output.rglob("*.tmp"))
    start([folder], world).wait(DONE)
    assert sorted(path.name for path in folder.output.iterdir()) == sorted((first, second))
    assert (folder.path / f"pieces/{first}.json").read_bytes() == kept
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items())
    assert folder.manifest_path.exists()
