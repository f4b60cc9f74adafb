"""Sharded parameters change nothing: any number of ranks computes what one process computes, over 20 steps.

Each world is started once and runs every case, one job after another; the tests compare what the jobs left behind.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import spread
from train_support import TOKENS_PER_STEP, make_run, metrics, run, training_job, weights

from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.manifest import read_manifest

pytestmark = pytest.mark.dist
# One sample per forward: four micro-batches on one rank, two on two. The masks of the samples count 1/5 to 4/5 of them.
STEPS = {"tokens": 20 * TOKENS_PER_STEP, "micro_batch": 1, "lr": 1e-3, "validate_every": 10, "checkpoint_every": 50}
ONLINE = {"targets": "online"}
RECOMPUTE = {"activation_checkpointing": True}
CASES = {
    "align": ("align", {}, {}),
    "cached": ("distill", {}, {}),
    "full": ("distill", {**ONLINE, "loss": "full", "divergence": "jsd", "temperature": 2.0}, {}),
    "topk": ("distill", {**ONLINE, "loss": "topk"}, {}),
    "recompute": ("distill", {**ONLINE, "loss": "topk_tail"}, RECOMPUTE),
}


@dataclass(frozen=True)
class Grid:
    """A number of ranks, and how many of them make a node."""

    ranks: int
    node: int = 0

    @property
    def strategy(self) -> dict:
        return {"name": "fsdp", "shard": "node" if self.node else "all"}


# Three ranks do not divide a batch of four, nor the parameters' rows.
GRIDS = {"one": Grid(1), "two": Grid(2), "three": Grid(3), "four": Grid(4), "two nodes of two": Grid(4, node=2)}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    """A teacher with tied embeddings: the head that the loss needs is sharded as the embedding."""
    return make_run(tmp_path_factory.mktemp("run"), tied=True)


def make_job(jobs: Path, name: str, case: str, strategy: dict) -> JobFolder:
    stage, changes, more = CASES[case]
    return training_job(jobs, f"{case} {name}", stage, world={**strategy, **more}, **{**STEPS, **changes})


@pytest.fixture(scope="module")
def single(jobs: Path) -> dict[str, JobFolder]:
    """What one process makes of each case, without any recomputation."""
    made = {case: make_job(jobs, "single", case, {"activation_checkpointing": False}) for case in CASES}
    made["recompute"] = training_job(jobs, "recompute single", "distill", **STEPS, **CASES["recompute"][1])
    for folder in made.values():
        folder.finish(run(folder))
    return made


@pytest.fixture(scope="module", params=GRIDS)
def sharded(jobs: Path, request: pytest.FixtureRequest) -> dict[str, JobFolder]:
    """The same cases on the ranks of a grid."""
    grid = GRIDS[request.param]
    made = {case: make_job(jobs, request.param, case, grid.strategy) for case in CASES}
    spread(list(made.values()), grid.ranks, node=grid.node)
    return made


def assert_near(one: JobFolder, two: JobFolder, first: float = 1e-5, later: float = 1e-4) -> None:
    """Every number of every step: within `first` up to the first step, `later` over all."""
    alone, spread_out = metrics(one), metrics(two)
    assert [r["step"] for r in alone] == [r["step"] for r in spread_out] == list(range(21))
    for a, b in zip(alone, spread_out, strict=True):
        assert a.keys() == b.keys()
        assert b == pytest.approx(a, rel=first if a["step"] <= 1 else later, abs=1e-7)


def assert_students_near(one: JobFolder, two: JobFolder, whole: float = 1e-5, entry: float = 2e-4) -> None:
    """As a whole; single entries whose gradient is all rounding move by AdamW's step, whatever its sign."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    a, b = (torch.cat([tensors[name].flatten() for name in first]) for tensors in (first, second))
    assert (a - b).norm() <= whole * b.norm()
    assert (a - b).abs().max() <= entry


@pytest.mark.parametrize("case", CASES)
def test_every_number_of_20_steps_is_that_of_one_process(sharded, single, case):
    assert_near(single[case], sharded[case])


@pytest.mark.parametrize("case", CASES)
def test_the_student_and_the_facts_are_those_of_one_process(sharded, single, case):
    assert_students_near(single[case], sharded[case])
    one, two = (read_manifest(made[case].manifest_path).facts for made in (single, sharded))
    assert np.allclose(two["output_gate"], one["output_gate"], rtol=1e-4, atol=0)
    assert (one["steps"], one["tokens"], one["skipped"]) == (two["steps"], two["tokens"], two["skipped"])


def test_the_masks_that_ranks_see_count_unequally(jobs):
    """Else the sameness above would not speak of the normalisation over the global batch."""
    from xlstm_distill.data.stream import SampleStream
    from xlstm_distill.train.students import mixture

    folder = make_job(jobs, "unequal", "cached", {})
    parts = mixture(folder.config.data.sources, jobs.parent / "shards")
    streams = [SampleStream(parts, batch=4, seed=0, rank=rank, world=2) for rank in range(2)]
    counts = [[int(next(stream).mask[:, 1:].sum()) for _ in range(20)] for stream in streams]
    assert sum(abs(a - b) > 0.2 * (a + b) for a, b in zip(*counts, strict=True)) >= 5


def test_untied_embeddings_too(tmp_path):
    jobs = make_run(tmp_path)
    one, two = make_job(jobs, "single", "cached", {}), make_job(jobs, "two", "cached", GRIDS["two"].strategy)
    run(one)
    spread([two], 2)
    assert_near(one, two)
    assert_students_near(one, two)


RECORD = """
import torch, torch.distributed as dist

def recorded(kind, name):
    plain = getattr(dist, name)
    def call(*tensors, **named):
        dtypes = {{str(t.dtype) for t in (*tensors, *named.values()) if isinstance(t, torch.Tensor)}}
        with open({file!r}, "a") as file:
            file.writelines(f"{{kind}} {{dtype}}\\n" for dtype in dtypes)
        return plain(*tensors, **named)
    setattr(dist, name, call)

for name in dir(dist):  # newer versions of torch call them *_single
    for kind in ("all_gather", "reduce_scatter"):
        if name in (kind + "_single", kind + "_into_tensor", kind + "_tensor"):
            recorded(kind, name)
"""


def test_bfloat16_parameters_travel_as_such_and_gradients_are_summed_in_float32(jobs, tmp_path):
    bf16 = {"precision": "bfloat16"}
    one = make_job(jobs, "bf16 single", "cached", bf16)
    two = make_job(jobs, "bf16 two", "cached", {**GRIDS["two"].strategy, **bf16})
    run(one)
    (tmp_path / "sitecustomize.py").write_text(RECORD.format(file=str(tmp_path / "collectives")))
    spread([two], 2, path=tmp_path)
    seen = set((tmp_path / "collectives").read_text().splitlines())
    assert "all_gather torch.bfloat16" in seen
    assert {line for line in seen if line.startswith("reduce_scatter")} == {"reduce_scatter torch.float32"}
    losses = [[r["loss"] for r in metrics(folder)[1:]] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(two).values())


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, pytest.param(RECOMPUTE, marks=pytest.mark.soak)], ids=["plain", "recompute"])
def test_compiled_layers_give_the_same_numbers(jobs, single, more):
    """The second start finds the graphs of the first in inductor's cache: sharding does not change them."""
    one = make_job(jobs, f"compiled single {len(more)}", "cached", {**more, "compile": True})
    two = make_job(jobs, f"compiled two {len(more)}", "cached", {**GRIDS["two"].strategy, **more, "compile": True})
    for world, folder in ((1, one), (2, two)):
        spread([folder], world, seconds=600)
        assert_near(single["cached"], folder, later=1e-3)
