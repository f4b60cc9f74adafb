"""Two ranks of a training that are asked to stop, at any moment and through any one of them, save and end with 75."""

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
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
MOST_SECONDS = 12.0
"""From the moment when a rank listens: loading, the first validation, then steps, validations and saves."""
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


def stop_once(folder: JobFolder, how: str, chance: random.Random, place: Path) -> float:
    """Start two ranks, ask one of them to stop at a random moment; returns the seconds until both have ended."""
    victim, delay = chance.randrange(2), chance.uniform(0, MOST_SECONDS)
    text = LIMITED.format(victim=victim, seconds=5 + delay) if how == "deadline" else ""
    ranks = start([folder], 2, path=patch(place, text))
    began = time.monotonic()
    if how != "deadline":
        until_listening(ranks)
        time.sleep(delay)
        began = time.monotonic()
        if how == "stop file":
            folder.stop_file.touch()
        else:
            ranks.processes[victim].send_signal(getattr(signal, f"SIG{how}"))
    ranks.wait(STOPPED)
    folder.stop_file.unlink(missing_ok=True)
    return time.monotonic() - began


def assert_saved_where_it_stopped(folder: JobFolder) -> int:
    """The newest checkpoint is whole, and of the last step that was logged; returns that."""
    newest = checkpoint.latest(folder.checkpoints)
    step = checkpoint.read_state(newest)["step"]  # compares every file with its hash
    logged = [record["step"] for record in metrics(folder)]
    assert step == (logged[-1] if logged else 0)
    assert logged == sorted(set(logged))
    return int(step)


def rounds(jobs: Path, name: str, count: int, place: Path, seed: int) -> Iterator[tuple[str, str, int]]:
    """Stops in turn by stage and by the way to ask; each goes on from the one before. Yields the step of each."""
    chance = random.Random(seed)
    folders = {stage: training_job(jobs, f"{stage} {name}", stage, **SETTINGS) for stage in STAGES}
    for number in range(count):
        stage, how = STAGES[number % 2], HOW[number // 2 % 4]
        stop_once(folders[stage], how, chance, place)
        yield stage, how, assert_saved_where_it_stopped(folders[stage])


def test_every_way_to_ask_ends_with_75_and_a_checkpoint_at_the_last_step(jobs, tmp_path):
    """Both stages in turn, resumed from stop to stop."""
    steps: dict[str, list[int]] = {stage: [] for stage in STAGES}
    for stage, _, step in rounds(jobs, "few", 8, tmp_path / "path", seed=time.time_ns()):
        steps[stage].append(step)
    for found in steps.values():
        assert found == sorted(found)
        assert found[-1] > 0


@pytest.mark.soak
def test_a_hundred_stops_leave_a_hundred_checkpoints(jobs, tmp_path):
    found = list(rounds(jobs, "many", 100, tmp_path / "path", seed=0))
    for stage in STAGES:
        steps = [step for of, _, step in found if of == stage]
        assert steps == sorted(steps)
        assert len(set(steps)) > 20


def test_a_capture_that_is_stopped_keeps_the_finished_sources_and_goes_on(jobs, tmp_path):
    config = make_config(jobs.parent / "shards")
    config = replace(config, cache=replace(config.cache, micro_batch=1))
    folder = job(jobs, "cache stopped", config, "cache", inputs=("fetch",), pieces=tuple(SOURCES))
    first, second = SOURCES
    ranks = start([folder], 1, path=patch(tmp_path / "path", SLOW_CAPTURE))
    ranks.until(lambda: (folder.path / f"pieces/{first}.json").exists())
    time.sleep(random.uniform(0, 1))
    ranks.processes[0].send_signal(signal.SIGUSR2)
    ranks.wait(STOPPED)
    assert sorted(path.name for path in folder.output.iterdir()) == [first]
    kept = (folder.path / f"pieces/{first}.json").read_bytes()
    start([folder], 1).wait(DONE)
    assert sorted(path.name for path in folder.output.iterdir()) == sorted((first, second))
    assert (folder.path / f"pieces/{first}.json").read_bytes() == kept
    assert folder.manifest_path.exists()
