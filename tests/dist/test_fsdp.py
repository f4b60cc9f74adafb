"""Two ranks with sharded parameters compute what one process computes, and go on where either stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from train_support import TOKENS_PER_STEP, After, make_run, metrics, run, training_job, weights

from xlstm_distill.contract.exitcode import Stopped
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.manifest import read_manifest

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
FSDP = {"name": "fsdp"}
ONLINE = {"targets": "online"}
CASES = [
    ("align", {}),
    ("distill", {}),
    ("distill", {**ONLINE, "loss": "full"}),
    ("distill", {**ONLINE, "loss": "topk"}),
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A teacher with tied embeddings: the head that the loss needs is sharded as the embedding."""
    return make_run(tmp_path_factory.mktemp("run"), tied=True)


def start(folder: JobFolder, ranks: int = 2) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "xlstm_distill.runtime.elastic", str(ranks), str(folder.path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)


def spread(folder: JobFolder, code: int = 0) -> None:
    """Run the job on two ranks to its end."""
    process = start(folder)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == code, errors.decode()[-3000:]


def assert_near(one, two):
    """Losses within 1e-5 at the first step, 1e-4 over all; validation before training within 1e-5."""
    first, second = metrics(one), metrics(two)
    assert [r["step"] for r in first] == [r["step"] for r in second]
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-5 if a["step"] <= 1 else 1e-4, abs=1e-7)


def assert_students_near(one, two):
    """Within 1e-5 as a whole; single entries whose gradient is all rounding move by AdamW's step, whatever its sign."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    a, b = (torch.cat([tensors[name].flatten() for name in first]) for tensors in (first, second))
    assert (a - b).norm() <= 1e-5 * b.norm()
    assert (a - b).abs().max() <= 2e-4


@pytest.mark.parametrize(("stage", "changes"), CASES)
def test_two_ranks_give_the_losses_and_the_student_of_one(jobs, stage, changes):
    name = f"{stage}-{changes.get('targets', 'cached')}-{changes.get('loss', '')}"
    # micro_batch 1 and an odd number of held-out samples: the ranks have shares of unequal size.
    changes = {"micro_batch": 1, "lr": 1e-3, **changes}
    one, two = (
        training_job(jobs, f"{name}-1", stage, **changes),
        training_job(jobs, f"{name}-2", stage, world=FSDP, **changes),
    )
    facts = run(one)
    spread(two)
    assert_near(one, two)
    assert_students_near(one, two)
    manifest = read_manifest(two.path / "manifest.json")
    assert np.allclose(manifest.facts["output_gate"], facts["output_gate"], rtol=1e-4, atol=0)


def test_untied_embeddings_too(tmp_path):
    jobs = make_run(tmp_path)
    one, two = training_job(jobs, "one", "distill"), training_job(jobs, "two", "distill", world=FSDP)
    run(one)
    spread(two)
    assert_near(one, two)
    assert_students_near(one, two)


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_checkpoint_of_two_ranks_resumes_on_two_to_the_bit_and_on_one(jobs, stage):
    half, full = 3 * TOKENS_PER_STEP, 6 * TOKENS_PER_STEP
    constant = {"schedule": "constant", "warmup": 0.0, "lr": 1e-3, "micro_batch": 1}
    whole = training_job(jobs, f"{stage}-whole", stage, world=FSDP, tokens=full, **constant)
    spread(whole)
    spread(training_job(jobs, f"{stage}-two", stage, world=FSDP, tokens=half, **constant))
    shutil.copytree(jobs / f"{stage}-two", jobs / f"{stage}-one")
    two = training_job(jobs, f"{stage}-two", stage, world=FSDP, tokens=full, **constant)
    spread(two)
    a, b = weights(whole), weights(two)
    assert all(a[key].equal(b[key]) for key in a)
    one = training_job(jobs, f"{stage}-one", stage, tokens=full, **constant)
    run(one)
    assert_students_near(whole, one)


def test_one_process_goes_on_as_two_ranks_after_a_stop(jobs):
    folder = training_job(jobs, "distill-grow", "distill", lr=1e-3)
    whole = training_job(jobs, "distill-grow-whole", "distill", lr=1e-3)
    run(whole)
    with pytest.raises(Stopped):
        run(folder, After(3))
    spread(training_job(jobs, "distill-grow", "distill", world=FSDP, lr=1e-3))
    assert_students_near(whole, folder)
    assert [record["step"] for record in metrics(folder)] == list(range(7))


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


def test_one_rank_that_is_told_to_stop_stops_both_with_a_checkpoint(jobs):
    folder = training_job(jobs, "distill-told", "distill", world=FSDP, tokens=100_000 * TOKENS_PER_STEP)
    process = start(folder)
    deadline = time.monotonic() + 120
    while len(metrics(folder)) < 3:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors.decode()[-3000:]
    assert errors.decode().count("stopped at step") == 2
    step = int((folder.checkpoints / "latest").read_text().removeprefix("step-"))
    assert step == metrics(folder)[-1]["step"]


def test_fsdp_with_a_single_rank_is_the_same_too(jobs):
    changes = {**ONLINE, "loss": "full", "lr": 1e-3}
    one = training_job(jobs, "distill-alone-1", "distill", **changes)
    two = training_job(jobs, "distill-alone-2", "distill", world=FSDP, **changes)
    run(one)
    process = start(two, ranks=1)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors.decode()[-3000:]
    assert_near(one, two)
