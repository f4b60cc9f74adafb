"""Killed for real and started again, on as many ranks or on others, a training ends as if nothing had happened."""

import json
import random
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from ranks import Ranks, spread, start
from train_support import BATCH, COUNTS, TOKENS_PER_STEP, make_run, make_shards, metrics, run, training_job, weights

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.data.stream import SampleStream
from xlstm_distill.train.students import mixture

pytestmark = pytest.mark.dist
STAGES = ("align", "distill")
STEPS, EVERY = 12, 4
# A constant rate, so that half of a training is the beginning of the whole.
SETTINGS = {
    "tokens": STEPS * TOKENS_PER_STEP, "micro_batch": 1, "lr": 1e-3, "schedule": "constant", "warmup": 0.0,
    "validate_every": 3, "checkpoint_every": EVERY,
}  # fmt: skip
# In every rank: writes down what it really takes from the stream, and takes its time, so that a signal meets a step.
RECORDER = """
import json, time
from pathlib import Path
from xlstm_distill.data.stream import SampleStream

def recorded(stream, plain=SampleStream.__next__):
    first = stream.position
    batch = plain(stream)
    line = {"step": first // stream.batch, "rank": stream.rank, "world": stream.world, "rows": batch.tokens.tolist()}
    with Path(__file__).with_name("taken.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")
    time.sleep(0.08)
    return batch

SampleStream.__next__ = recorded
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tied=True)


def recorder(folder: Path) -> Path:
    """A folder for PYTHONPATH that makes ranks write down the samples they take."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(RECORDER)
    return folder


def taken(folder: Path) -> dict[int, list]:
    """What the ranks took: step → rows of its global batch in the order of the ranks; empties the record.

    Asserts that no rank took a step twice and that every step was taken by all, but for the last, which a kill cut.
    """
    parts: dict[int, dict[int, list]] = defaultdict(dict)
    world = 0
    for line in (folder / "taken.jsonl").read_text().splitlines():
        record = json.loads(line)
        world = record["world"]
        assert record["rank"] not in parts[record["step"]]
        parts[record["step"]][record["rank"]] = record["rows"]
    (folder / "taken.jsonl").unlink()
    assert sorted(parts) == list(range(min(parts), max(parts) + 1))
    whole = {
        step: [row for rank in sorted(ranks) for row in ranks[rank]]
        for step, ranks in parts.items()
        if len(ranks) == world
    }
    assert parts.keys() - whole.keys() <= {max(parts)}
    return whole


def expected(folder: JobFolder, steps: Iterable[int]) -> dict[int, list]:
    """The rows of those global batches as one process that never stopped sees them."""
    sources = folder.config.data.sources
    stream = SampleStream(mixture(sources, Path(folder.config.data.shards)), batch=BATCH, seed=folder.config.seed)
    every = {step: next(stream).tokens.tolist() for step in range(max(steps) + 1)}
    return {step: every[step] for step in steps}


def saved(folder: JobFolder) -> int:
    """Step of the newest checkpoint."""
    latest = folder.checkpoints / "latest"
    return int(latest.read_text().removeprefix("step-")) if latest.exists() else 0


def reached(folder: JobFolder) -> int:
    records = metrics(folder)
    return int(records[-1]["step"]) if records else 0


def kill_between_checkpoints(ranks: Ranks, folder: JobFolder) -> None:
    """SIGKILL every rank when steps were made that no checkpoint holds."""
    ranks.until(lambda: saved(folder) and reached(folder) >= saved(folder) + 2)
    ranks.kill()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_killed_and_gone_on_equals_an_unbroken_run_to_the_bit(jobs, tmp_path, world):
    """Both stages in three starts: the first is killed in Stage I, the second in Stage II."""

    def make(stage: str, what: str, steps: int = STEPS) -> JobFolder:
        return training_job(jobs, f"{stage} {what} {world}", stage, **{**SETTINGS, "tokens": steps * TOKENS_PER_STEP})

    path = recorder(tmp_path / "path")
    whole = {stage: make(stage, "whole") for stage in STAGES}
    broken = {stage: make(stage, "broken") for stage in STAGES}
    half = [make(stage, "half", STEPS // 2) for stage in STAGES]
    spread([*whole.values(), *half], world)
    kill_between_checkpoints(start([broken["align"]], world, path=path), broken["align"])
    before, position = taken(path), saved(broken["align"])
    half = [make(stage, "half") for stage in STAGES]  # finished, and now with twice the budget
    ranks = start([broken["align"], broken["distill"]], world, path=path)
    kill_between_checkpoints(ranks, broken["distill"])
    lines = (path / "taken.jsonl").read_text()
    assert lines.count('"step": 0,') == world  # of Stage II alone: Stage I went on
    spread([broken["distill"], *half], world)

    assert position == min(json.loads(line)["step"] for line in lines.splitlines()[:world])
    assert max(before) >= position  # there were steps to make again
    for stage, extended in zip(STAGES, half, strict=True):
        for other in (broken[stage], extended):
            assert equal(weights(whole[stage]), weights(other)), other.path
        assert metrics(broken[stage]) == metrics(whole[stage])


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("stage", STAGES)
def test_4_2_1_3_ranks_take_the_samples_of_one_unbroken_run(jobs, tmp_path, stage):
    """4 as two nodes of two; they stop when one is told to. 2 are killed, 1 stops, 3 finish."""
    budget = {**SETTINGS, "tokens": 40 * TOKENS_PER_STEP}
    single = training_job(jobs, f"{stage} single", stage, **budget)
    run(single)
    path = recorder(tmp_path / "path")
    told: dict[int, list] = {}  # what the checkpoints keep of what was taken

    def go_on(world: int, shard: str = "all") -> tuple[JobFolder, Ranks]:
        strategy = {"name": "single" if world == 1 else "fsdp", "shard": shard}
        folder = training_job(jobs, f"{stage} elastic", stage, world=strategy, **budget)
        return folder, start([folder], world, node=2 if shard == "node" else 0, path=path)

    def account(folder: JobFolder, first: int) -> int:
        """Take the record of a phase that went on at `first`; returns where the next one has to."""
        rows, end = taken(path), saved(folder)
        assert min(rows) == first < end
        assert rows == expected(folder, rows)
        assert not told.keys() & set(range(first, end))
        told.update({step: rows[step] for step in range(first, end)})
        return end

    folder, ranks = go_on(4, "node")
    ranks.until(lambda: reached(folder) >= 3)
    ranks.processes[2].send_signal(signal.SIGUSR2)
    assert ranks.wait(75).count("stopped at step") == 4
    end = account(folder, 0)
    assert end == reached(folder) < 30
    folder, ranks = go_on(2)
    kill_from = end + EVERY
    ranks.until(lambda: saved(folder) >= kill_from and reached(folder) >= saved(folder) + 2)
    ranks.kill()
    end = account(folder, end)
    folder, ranks = go_on(1)
    ranks.until(lambda: reached(folder) >= end + 3)
    folder.stop_file.touch()
    ranks.wait(75)
    folder.stop_file.unlink()
    end = account(folder, end)
    assert end < 40
    folder, ranks = go_on(3)
    ranks.wait()
    assert account(folder, end) == 40
    assert told == expected(folder, range(40))
    assert_near(single, folder)


def assert_near(single: JobFolder, elastic: JobFolder) -> None:
    """A stop inside a validation leaves two lines for its step: what was trained, and later what was validated."""
    one, two = ({r["step"]: {} for r in metrics(folder)} for folder in (single, elastic))
    for found, folder in ((one, single), (two, elastic)):
        for record in metrics(folder):
            found[record["step"]].update(record)
    assert list(one) == list(two) == list(range(41))
    for step, values in one.items():
        assert two[step].keys() == values.keys()
        assert two[step] == pytest.approx(values, rel=1e-4, abs=1e-7)
    first, second = weights(single), weights(elastic)
    a, b = (torch.cat([tensors[name].flatten() for name in first]) for tensors in (first, second))
    assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.soak
@pytest.mark.parametrize(("stage", "world"), list(product(STAGES, (2, 4))))
def test_ranks_killed_ten_times_at_random_moments_end_the_same_to_the_bit(jobs, tmp_path, stage, world):
    budget = {**SETTINGS, "tokens": 80 * TOKENS_PER_STEP}
    whole, broken = (training_job(jobs, f"{stage} {name} {world}", stage, **budget) for name in ("calm", "soak"))
    spread([whole], world)
    path, chance = recorder(tmp_path / "path"), random.Random(world)
    for _ in range(10):
        ranks, before = start([broken], world, path=path), saved(broken)
        ranks.until(lambda before=before: saved(broken) > before)
        time.sleep(chance.uniform(0, 0.4))  # in a step, a validation or a save
        ranks.kill()
    assert saved(broken) < 80
    spread([broken], world)
    assert equal(weights(whole), weights(broken))
    assert metrics(broken) == metrics(whole)


@pytest.fixture(scope="module")
def finished(jobs) -> Path:
    """The folder of a run with a training that ended."""
    run(training_job(jobs, "distill-math", "distill", **SETTINGS))
    return jobs.parent


@pytest.fixture
def begun(finished, tmp_path) -> JobFolder:
    """A training whose checkpoint another one may try to go on from, in a run of its own."""
    shutil.copytree(finished / "jobs", tmp_path / "run/jobs", symlinks=True)
    (tmp_path / "run/shards").symlink_to(finished / "shards")
    return training_job(tmp_path / "run/jobs", "distill-math", "distill", **SETTINGS)


def refused(folder: JobFolder, match: str) -> None:
    with pytest.raises(Mistake, match=match) as caught:
        run(folder)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_teacher_is_refused(begun):
    other = replace(begun.job, identity={**begun.job.identity, "teacher": "another"})
    refused(replace(begun, job=other), "made with teacher=None, this job has another; use another --name")


def test_a_checkpoint_of_another_seed_is_refused_by_every_rank_in_one_line(begun):
    replace(begun, job=replace(begun.job, identity={"seed": 1})).write()
    said = spread([begun], 2, code=2)
    assert said.count("made with seed=0, this job has 1; use another --name") == 2
    assert "Traceback" not in said


def test_a_checkpoint_of_a_student_of_another_shape_is_refused(begun, tmp_path):
    """The settings are equal: the folder of the aligned student was exchanged."""
    from model_support import tiny_student

    tiny_student(tmp_path / "other", tied=True, window=4, sinks=2, teacher=wide_teacher())
    shutil.rmtree(begun.input("align") / "student")
    shutil.copytree(tmp_path / "other/student", begun.input("align") / "student")
    refused(begun, r"does not fit this student \(.*use another --name")


def wide_teacher():
    from model_support import tiny_teacher

    return tiny_teacher(intermediate_size=64, tie_word_embeddings=True)


def exchange_shards(folder: JobFolder, monkeypatch: pytest.MonkeyPatch, **counts: int) -> JobFolder:
    """The same job over shards of another seed, or with other numbers of samples."""
    import numpy as np

    shards = folder.path.parent / "exchanged"
    if counts:
        monkeypatch.setitem(COUNTS, "train", counts["train"])
    monkeypatch.setattr(np.random, "default_rng", lambda seed: np.random.Generator(np.random.PCG64(seed + 1)))
    make_shards(shards)
    config = folder.config
    data, targets = replace(config.data, shards=str(shards)), replace(config.distill, targets="online")
    return replace(folder, config=replace(config, data=data, distill=targets))


def test_a_checkpoint_over_another_number_of_samples_is_refused(begun, monkeypatch):
    refused(exchange_shards(begun, monkeypatch, train=15), "data position: .* use another --name")


def test_a_checkpoint_over_as_many_other_samples_is_refused(begun, monkeypatch):
    refused(exchange_shards(begun, monkeypatch), "data position: content was .* use another --name")
