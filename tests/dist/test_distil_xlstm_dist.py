"""Distil-xLSTM under FSDP2 and ZeRO-3 on two ranks computes what one process computes; what is frozen stays."""

from pathlib import Path

import pytest
import torch
from distil_support import distil_job, distil_run
from ranks import spread
from safetensors.torch import load_file
from test_fsdp import assert_near
from train_support import TOKENS_PER_STEP, metrics, run, weights

from xlstm_distill.contract.job import JobFolder

pytestmark = pytest.mark.dist
# One sample per forward: four micro-batches on one rank, two on each of two.
STEPS = {"tokens": 20 * TOKENS_PER_STEP, "micro_batch": 1, "lr": 1e-3, "validate_every": 10, "checkpoint_every": 50}
WORLDS = {
    "fsdp": {"name": "fsdp"},
    "fsdp recompute": {"name": "fsdp", "activation_checkpointing": True},
    "zero3": {"name": "zero3"},
    "zero3 offload": {"name": "zero3", "offload": True},
}
HALF = {name: {"name": name, "precision": "bfloat16"} for name in ("single", "fsdp", "zero3")}
FROZEN = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    """Tied: the frozen head is sharded as the embedding."""
    return distil_run(tmp_path_factory.mktemp("run"), tied=True)


@pytest.fixture(scope="module")
def made(jobs: Path) -> dict[str, JobFolder]:
    """One process, and every case on two ranks, which are started once."""
    single = {"single": distil_job(jobs, "single", **STEPS)}
    single["half single"] = distil_job(jobs, "half single", world=HALF["single"], **STEPS)
    for folder in single.values():
        run(folder)
    two = {name: distil_job(jobs, name, world=world, **STEPS) for name, world in WORLDS.items()}
    two |= {f"half {n}": distil_job(jobs, f"half {n}", world=HALF[n], **STEPS) for n in ("fsdp", "zero3")}
    spread(list(two.values()), 2)
    return single | two


@pytest.mark.parametrize("name", WORLDS)
def test_every_number_of_20_steps_and_the_student_are_those_of_one_process(made, name):
    assert_near(made["single"], made[name])
    one, two = felt(made["single"]), felt(made[name])
    assert (one - two).norm() <= 1e-5 * two.norm()
    assert (one - two).abs().max() <= 1e-4


def felt(folder: JobFolder) -> torch.Tensor:
    """All parameters but the biases of the sLSTM's input gates: these scale c and n alike, so y does not depend on
    them, their gradient is rounding, and AdamW makes steps of that."""
    tensors = weights(folder)
    for name, tensor in tensors.items():
        if name.endswith("slstm_cell._bias_"):
            tensor.view(4, -1)[0] = 0.0
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_in_bfloat16_the_losses_are_near_and_what_is_frozen_is_not_rounded(jobs, made):
    files = (jobs / "align/output/student").glob("*.safetensors")
    before = {name: tensor for file in files for name, tensor in load_file(file).items()}[FROZEN]
    assert not before.equal(before.bfloat16().float())
    alone = [record["loss"] for record in metrics(made["half single"])[1:]]
    for name in ("half fsdp", "half zero3"):
        losses = [record["loss"] for record in metrics(made[name])[1:]]
        assert losses == pytest.approx(alone, rel=2e-2)
        assert losses != pytest.approx(alone, rel=1e-7)
        assert weights(made[name])[FROZEN].equal(before)
