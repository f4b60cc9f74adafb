"""Training: an interrupted run ends where an unbroken one does, to the bit; accumulation changes nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_support import (
    SOURCES,
    TOKENS_PER_STEP,
    After,
    Never,
    load_student,
    make_run,
    metrics,
    run,
    small_disk,
    training_job,
    weights,
)

from xlstm_distill import stages
from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Guard
from xlstm_distill.data.stream import SampleStream, read_samples
from xlstm_distill.model.gates import GateRecorder
from xlstm_distill.objectives.align import LayerAlignment
from xlstm_distill.parallel.strategy import make_strategy
from xlstm_distill.runtime.stop import StopFlag
from xlstm_distill.train.align import Alignment
from xlstm_distill.train.distill import Distillation
from xlstm_distill.train.loop import held_out_share
from xlstm_distill.train.students import empty_student, mixture

ROOT = Path(__file__).parents[2]
STAGES = [("align", {}), ("distill", {}), ("distill", {"targets": "online", "loss": "full"})]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def assert_same(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not a[name].equal(b[name])] == []
    assert metrics(first) == metrics(second)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "changes"), STAGES)
@pytest.mark.parametrize("stops", [[3], [0, 2, 1]])
def test_stopped_and_gone_on_equals_an_unbroken_run_to_the_bit(jobs, stage, changes, stops, tmp_path_factory):
    name = f"{stage}-{changes.get('loss', 'default')}-{len(stops)}"
    whole, broken = (training_job(jobs, f"{name}-{kind}", stage, **changes) for kind in ("whole", "broken"))
    facts = run(whole)
    for after in stops:
        with pytest.raises(Stopped, match=r"stopped at step . of 6; launch again to go on"):
            run(broken, After(after))
    assert not (broken.output / "student").exists()
    again = run(broken)
    assert_same(whole, broken)
    del facts["tokens_per_s"], again["tokens_per_s"]
    assert facts == again
    assert [record["step"] for record in metrics(broken)] == list(range(7))


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_training_lowers_what_it_minimises_and_reports_it(jobs, stage):
    longer = {"tokens": 20 * TOKENS_PER_STEP, "validate_every": 0, "schedule": "constant", "lr": 5e-3}
    teacher_only = {"gamma": 0.0, "beta": 1.0} if stage == "distill" else {}
    folder = training_job(jobs, f"{stage}-long", stage, **longer, **teacher_only)
    facts = run(folder)
    assert (facts["steps"], facts["tokens"]) == (20, 20 * TOKENS_PER_STEP)
    if stage == "align":
        assert len(facts["error_before"]) == len(facts["error_after"]) == len(facts["output_gate"]) == 2
        assert all(after < before for before, after in zip(facts["error_before"], facts["error_after"], strict=True))
    else:
        assert set(facts["validation"]) == {"start", "end"}
        assert set(facts["validation"]["end"]) == set(SOURCES)
        first, last = (sum(r["loss/kl"] for r in metrics(folder)[part]) for part in (slice(1, 6), slice(-5, None)))
        assert last < first


def test_a_stop_file_ends_in_a_checkpoint_and_a_second_stop_at_the_same_step_keeps_it(jobs):
    folder = training_job(jobs, "distill-file", "distill")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    folder.stop_file.touch()
    for _ in range(2):
        with pytest.raises(Stopped, match="at step 0 of 6"):
            run(folder, StopFlag(folder.stop_file))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert (folder.checkpoints / "latest").read_text() == "step-0"
    with pytest.raises(Stopped):
        run(folder, After(2))
    written = (folder.checkpoints / "step-2/hashes.json").stat().st_mtime_ns
    with pytest.raises(Stopped):
        run(folder, After(0))
    assert (folder.checkpoints / "step-2/hashes.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_longer_budget_goes_on_from_the_end(jobs, stage):
    constant = {"schedule": "constant", "warmup": 0.0, "validate_every": 2}
    whole = training_job(jobs, f"{stage}-budget", stage, tokens=4 * TOKENS_PER_STEP, **constant)
    short = training_job(jobs, f"{stage}-short", stage, tokens=2 * TOKENS_PER_STEP, **constant)
    run(whole)
    run(short)
    run(training_job(jobs, f"{stage}-short", stage, tokens=4 * TOKENS_PER_STEP, **constant))
    a, b = weights(whole), weights(short)
    assert all(a[name].equal(b[name]) for name in a)
    lines = metrics(short)
    assert [record["step"] for record in lines] == [0, 1, 2, 3, 4]
    assert [record["total"] for record in lines] == [2, 2, 2, 4, 4]


def test_a_budget_below_the_checkpoint_is_refused_in_one_line(jobs):
    run(training_job(jobs, "align-smaller", "align", tokens=4 * TOKENS_PER_STEP))
    with pytest.raises(Mistake, match=r"checkpoint is at step 4, beyond the 2 steps"):
        run(training_job(jobs, "align-smaller", "align", tokens=2 * TOKENS_PER_STEP))


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_finished_job_is_run_again_without_a_step(jobs, stage):
    folder = training_job(jobs, f"{stage}-again", stage)
    first = run(folder)
    before = weights(folder)
    second = run(folder)
    assert {k: v for k, v in first.items() if k != "tokens_per_s"} == {
        k: v for k, v in second.items() if k != "tokens_per_s"
    }
    assert all(before[name].equal(tensor) for name, tensor in weights(folder).items())


def test_a_checkpoint_of_other_settings_is_refused_in_one_line(jobs):
    folder = training_job(jobs, "distill-other", "distill")
    with pytest.raises(Stopped):
        run(folder, After(1))
    other = JobFolder(folder.path, replace(folder.job, identity={"seed": 1}), folder.config)
    with pytest.raises(Mistake, match=r"step-1: made with seed=0, this job has 1; use another --name") as caught:
        run(other)
    assert "\n" not in str(caught.value)


def gradients(jobs, stage, micro_batch):
    config = training_job(jobs, "unused", stage, micro_batch=micro_batch, clip=0.0).config
    strategy = make_strategy(config.strategy, World())
    model = load_student(jobs / "align/output" / ("initial" if stage == "align" else "student"))
    shards = jobs / "cache/output"
    batch = next(SampleStream(mixture(SOURCES, shards), batch=4, seed=0))
    if stage == "align":
        model.requires_grad_(False)
        for parameter in model.mixer_parameters().values():
            parameter.requires_grad_(True)
        task = Alignment(model, replace(config.align, clip=0.0), config.adamw, strategy, {})
    else:
        from xlstm_distill.teacher.targets import cached_targets

        settings = replace(config.distill, loss=config.loss)
        task = Distillation(model, cached_targets, settings, config.adamw, strategy, {})
    values = task.gradients(batch)
    return values, {name: p.grad for name, p in task.parameters.items()}


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_accumulation_gives_the_gradients_of_the_whole_batch(jobs, stage):
    (values, whole), (parts_values, parts) = gradients(jobs, stage, 4), gradients(jobs, stage, 1)
    assert values == pytest.approx(parts_values, rel=1e-5)
    for name, gradient in whole.items():
        assert (gradient - parts[name]).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_recomputed_activations_change_nothing(jobs):
    plain = training_job(jobs, "distill-kept", "distill")
    again = training_job(jobs, "distill-recomputed", "distill", world={"activation_checkpointing": True})
    run(plain)
    run(again)
    assert_same(plain, again)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_bfloat16_products_stay_near_and_parameters_stay_float32(jobs, stage):
    exact = training_job(jobs, f"{stage}-float32", stage)
    half = training_job(jobs, f"{stage}-bfloat16", stage, world={"precision": "bfloat16"})
    run(exact)
    run(half)
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.float32}
    for a, b in zip(metrics(exact), metrics(half), strict=True):
        assert a.keys() == b.keys()
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=0.05)


@pytest.mark.parametrize(("count", "world", "size"), [(5, 2, 1), (6, 2, 2), (1, 2, 4), (7, 3, 2), (3, 4, 1)])
def test_ranks_share_held_out_samples_in_as_many_forwards_each(jobs, count, world, size):
    batch = read_samples(jobs.parent / "shards/mine/train", count)
    shares = [list(held_out_share(batch, size, World(rank=rank, size=world))) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    seen = [row.tolist() for share in shares for part, counts in share if counts for row in part.tokens]
    assert sorted(seen) == sorted(batch.tokens.tolist())
    assert all(len(part.tokens) for share in shares for part, _ in share)


def test_a_part_that_does_not_count_changes_no_sum(jobs):
    config = training_job(jobs, "unused", "align").config
    strategy = make_strategy(config.strategy, World())
    model = load_student(jobs / "align/output/student")
    model.requires_grad_(False)
    for parameter in model.mixer_parameters().values():
        parameter.requires_grad_(True)
    task = Alignment(model, config.align, config.adamw, strategy, {})
    batch = read_samples(jobs.parent / "shards/mine/train", 3)
    with GateRecorder(model) as gates:
        task._forward([(batch, True)], train=False)
    alone = task._sums()
    with GateRecorder(model) as gates_of_both:
        task._forward([(batch, True), (batch.rows(slice(0, 1)), False)], train=False)
    assert task._sums().equal(alone)
    assert gates_of_both.means().equal(gates.means())


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_the_gates_on_held_out_text_are_facts_numbers_and_pictures(jobs, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = training_job(jobs, f"{stage}-gates", stage)
    facts = run(folder)
    model = load_student(folder.output / "student")
    for mixer in model.mixers if stage == "align" else ():  # Stage I sees the teacher's stream
        mixer.objective = LayerAlignment(train=False)
    with GateRecorder(model) as gates, torch.no_grad():
        for name in SOURCES:  # validation_samples=6 of two sources
            model(input_ids=read_samples(jobs / f"cache/output/{name}/validation", 3).tokens[:, :-1])
    found = torch.tensor(facts["output_gate"], dtype=torch.float64)
    torch.testing.assert_close(found, gates.means(), atol=1e-6, rtol=1e-5)
    assert facts["heads_shut"] == []
    history = {r["step"]: [r[f"gates_layer/{n}"] for n in range(2)] for r in metrics(folder) if "gates_layer/0" in r}
    assert list(history) == [0, 3, 6]
    assert history[6] == pytest.approx(found.mean(1).tolist())
    assert history[0] != history[6]
    board = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in board.Images("gates/output_gate")] == [0, 3, 6]


def test_a_missing_student_and_missing_shards_are_one_line(jobs, tmp_path):
    with pytest.raises(Mistake, match="no student there"):
        empty_student(tmp_path)
    with pytest.raises(Mistake, match="no training shards for source mine"):
        mixture(SOURCES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_killed_at_any_moment_and_started_again_it_ends_the_same(jobs, stage):
    settings = {"tokens": 120 * TOKENS_PER_STEP, "checkpoint_every": 7, "validate_every": 50}
    whole = training_job(jobs, f"{stage}-unkilled", stage, **settings)
    killed = training_job(jobs, f"{stage}-killed", stage, **settings)
    run(whole)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for target in (3, 40):
        command = [sys.executable, "-m", "xlstm_distill", str(killed.path)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while len(metrics(killed)) < target and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    run(killed, Never())
    torch.testing.assert_close(weights(killed), weights(whole), rtol=0, atol=0)
    assert metrics(killed) == metrics(whole)


def poison(monkeypatch, steps):
    """Shards whose samples make the loss NaN: what the teacher said of these global batches is NaN."""
    real = SampleStream.__next__

    def sick(stream):
        batch = real(stream)
        if stream.position // stream.batch in steps:
            ids, log_probs, tail = batch.targets
            batch.targets = (ids, log_probs * torch.nan, tail)
        return batch

    monkeypatch.setattr(SampleStream, "__next__", sick)


def test_a_sick_step_is_skipped_counted_and_named_and_leaves_nothing_behind(jobs, monkeypatch, capsys):
    folder = training_job(jobs, "distill-sick", "distill", schedule="constant", warmup=0.0, tokens=3 * TOKENS_PER_STEP)
    poison(monkeypatch, {2})
    facts = run(folder)
    told = capsys.readouterr().out
    assert facts["skipped"] == 1
    assert "step 2 skipped: loss is nan; samples " in told
    assert "train: " in told.split("samples")[1]
    records = {r["step"]: r for r in metrics(folder)}
    assert [records[n]["skipped"] for n in (1, 2, 3)] == [0, 1, 1]
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())

    # The same without the sick batch: one update fewer, the same parameters.
    monkeypatch.undo()
    real = SampleStream.__next__

    def without_the_second(stream):
        if stream.position == stream.batch:
            real(stream)
        return real(stream)

    monkeypatch.setattr(SampleStream, "__next__", without_the_second)
    short = training_job(jobs, "distill-two", "distill", schedule="constant", warmup=0.0, tokens=2 * TOKENS_PER_STEP)
    run(short)
    a, b = weights(folder), weights(short)
    assert all(a[name].equal(b[name]) for name in a)


def test_steps_that_stay_sick_end_the_job_with_one_line_that_names_samples(jobs, monkeypatch):
    folder = training_job(jobs, "distill-ill", "distill")
    folder = JobFolder(folder.path, folder.job, replace(folder.config, guard=Guard(skip_limit=2)))
    poison(monkeypatch, {3, 4, 5})
    with pytest.raises(
        Mistake, match=r"2 steps in a row were skipped .* step 4 skipped: loss is nan; samples .*train: "
    ):
        run(folder)
    assert (folder.checkpoints / "latest").read_text() == "step-2"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_stop_inside_a_validation_saves_and_the_validation_is_made_later(jobs, stage):
    whole, folder = (training_job(jobs, f"{stage}-{name}", stage) for name in ("unbroken", "validating"))
    run(whole)
    for count in (2, 5):  # inside the first validation, and inside that of step 3
        with pytest.raises(Stopped, match=r"at step (0|3) of 6"):
            run(folder, After(count, "validation"))
    run(folder)
    assert all(a.equal(b) for a, b in zip(weights(whole).values(), weights(folder).values(), strict=True))
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_job_on_a_disk_that_takes_nothing_ends_with_one_line(jobs, tmp_path, capfd, how):
    with small_disk(tmp_path / "disk", "3m") as disk:
        shutil.copytree(jobs / "fetch", disk / "fetch")
        shutil.copytree(jobs / "align", disk / "align")
        (disk / "cache").symlink_to(jobs / "cache")
        folder = training_job(jobs, "distill-disk", "distill")
        shutil.copytree(folder.path, disk / "distill-disk")
        if how == "full":
            with suppress(OSError), (disk / "fill").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert stages.main([str(disk / "distill-disk")]) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert [line for line in errors.splitlines() if line.startswith("error: ")]
