"""A training on a GPU: NCCL's process group, pinned copies, a stop by a signal, and on from its checkpoint."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from train_support import TOKENS_PER_STEP, make_run, metrics, training_job, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from ranks import Ranks

pytestmark = pytest.mark.gpu
STEPS = 200


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_sharded_training_stops_at_a_signal_and_ends_where_an_unbroken_one_does(tmp_path, stage):
    jobs = make_run(tmp_path)
    settings = {"tokens": STEPS * TOKENS_PER_STEP, "validate_every": 0, "world": {"name": "fsdp"}}
    whole, stopped = (training_job(jobs, f"{stage}-{name}", stage, **settings) for name in ("whole", "stopped"))
    Ranks(["-m", "xlstm_distill", str(whole.path)], 1, tmp_path / "whole").wait()
    first = Ranks(["-m", "xlstm_distill", str(stopped.path)], 1, tmp_path / "first")
    first.until(lambda: len(metrics(stopped)) > 3, code=75)
    first.processes[0].send_signal(signal.SIGUSR2)
    first.wait(75)
    assert (stopped.checkpoints / "latest").read_text() == f"step-{metrics(stopped)[-1]['step']}"
    Ranks(["-m", "xlstm_distill", str(stopped.path)], 1, tmp_path / "second").wait()
    a, b = weights(whole), weights(stopped)
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)
    assert metrics(stopped)[-1]["step"] == STEPS
