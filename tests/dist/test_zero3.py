"""DeepSpeed's ZeRO-3 computes what one process computes, keeps FSDP's checkpoints, and forgets a step that was sick.

Each number of ranks is started as rarely as can be and runs many jobs, one after another; the tests compare what those
left behind.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from ranks import spread
from test_fsdp import assert_near, assert_students_near
from train_support import TOKENS_PER_STEP, make_run, metrics, run, training_job, weights

from xlstm_distill.contract.job import JobFolder
from xlstm_distill.parallel.strategy import Strategy

pytestmark = pytest.mark.dist
# One sample per forward: four micro-batches on one rank, two on each of two.
STEPS = {"tokens": 20 * TOKENS_PER_STEP, "micro_batch": 1, "lr": 1e-3, "validate_every": 10, "checkpoint_every": 50}
HALF = {"tokens": 10 * TOKENS_PER_STEP}
CONSTANT = {"schedule": "constant", "warmup": 0.0}
ONLINE = {"targets": "online"}
OFFLOAD = {"offload": True}
SOFT = {"loss": "full", "divergence": "reverse", "temperature": 2.0}
RECOMPUTE = {"activation_checkpointing": True}
# name: (run, stage, training, strategy, name of what one process makes of it)
CASES: dict[str, tuple[str, str, dict, dict, str]] = {
    "align": ("tied", "align", {}, {}, "align"),
    "align offload": ("tied", "align", {}, OFFLOAD, "align"),
    "cached": ("tied", "distill", {}, {}, "cached"),
    "offload": ("tied", "distill", {}, OFFLOAD, "cached"),
    "recompute": ("tied", "distill", {**ONLINE, "loss": "topk_tail"}, RECOMPUTE, "topk_tail"),
    "untied": (
        "untied",
        "distill",
        {**ONLINE, **SOFT},
        {},
        "untied",
    ),
}
# name: (stage, strategy, training), beside precision=bfloat16
BF16_CASES: dict[str, tuple[str, dict, dict]] = {
    "bf16": ("distill", {}, ONLINE),
    "bf16 offload": ("distill", OFFLOAD, ONLINE),
    "bf16 still": ("distill", {}, {"lr": 1e-30, "mixer_lr": 1e-30}),
    "bf16 align": ("align", {}, {}),
}
SICK_STEP = 8
# On one rank only, in the first of two micro-batches.
SICK = f"""
from xlstm_distill.parallel.zero3 import ZeRO3

plain = ZeRO3.backward

def backward(self, loss, *, last):
    if self.folder.path.name.startswith("sick"):
        self.seen = getattr(self, "seen", 0) + 1
        if self.world.rank == 1 and self.seen == {2 * SICK_STEP - 1}:
            loss = loss * float("nan")
    plain(self, loss, last=last)

ZeRO3.backward = backward
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: make_run(root / name, tied=name == "tied") for name in ("tied", "untied")}


def make_job(runs: dict[str, Path], name: str, case: str, *, strategy: str = "zero3", **changes: object) -> JobFolder:
    where, stage, training, more, _ = CASES[case]
    if strategy == "single":
        more = {}
    return training_job(runs[where], name, stage, world={"name": strategy, **more}, **{**STEPS, **training, **changes})


@pytest.fixture(scope="module")
def single(runs) -> dict[str, JobFolder]:
    """What one process makes of each case, and of a constant learning rate."""
    cases = {reference: case for case, (*_, reference) in CASES.items()}
    made = {name: make_job(runs, f"{name} single", case, strategy="single") for name, case in cases.items()}
    made["constant"] = make_job(runs, "constant single", "cached", strategy="single", **CONSTANT)
    for folder in made.values():
        run(folder)
    return made


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory) -> dict[str, JobFolder]:
    """The cases on two ranks, and what else two ranks are needed for."""
    made = {case: make_job(runs, f"{case} two", case) for case in CASES}
    made |= {name: make_job(runs, name, case) for name, case in {"sick": "cached", "sick offload": "offload"}.items()}
    halves = {"half fsdp": ("cached", "fsdp"), "half zero3": ("cached", "zero3"), "half offload": ("offload", "zero3")}
    for name, (case, strategy) in halves.items():
        made[name] = make_job(runs, name, case, strategy=strategy, **HALF, **CONSTANT)
    for name, (stage, more, changes) in BF16_CASES.items():
        world = {"name": "zero3", "precision": "bfloat16", **more}
        made[name] = training_job(runs["tied"], name, stage, world=world, **{**STEPS, **HALF, **changes})
    path = tmp_path_factory.mktemp("sick")
    (path / "sitecustomize.py").write_text(SICK)
    spread(list(made.values()), 2, path=path)
    return made


@pytest.mark.parametrize("case", CASES)
def test_every_number_of_20_steps_and_the_student_are_those_of_one_process(two, single, case):
    reference = single[CASES[case][-1]]
    assert_near(reference, two[case])
    assert_students_near(reference, two[case])


def test_what_deepspeed_was_told_stands_in_the_job_folder(two):
    for case, offloaded in (("align", False), ("cached", False), ("offload", True)):
        told = json.loads((two[case].path / "deepspeed.json").read_text())
        assert ("offload_param" in told["zero_optimization"]) is offloaded
        clip = two[case].config.distill.clip if case != "align" else 0.0  # Stage I clips layer by layer, by itself
        assert told["gradient_clipping"] == clip


@pytest.mark.parametrize("kind", ["sick", "sick offload"])
def test_a_sick_step_leaves_nothing_behind(runs, two, monkeypatch, kind):
    """One rank's gradient is not finite: both skip the step, and go on as one process that skipped it."""
    calls = 0
    plain = Strategy.backward

    def backward(self, loss, *, last):
        nonlocal calls
        calls += 1
        plain(self, loss * float("nan") if calls == 4 * SICK_STEP else loss, last=last)

    monkeypatch.setattr(Strategy, "backward", backward)
    alone = make_job(runs, f"{kind} alone", "cached", strategy="single")
    assert run(alone)["skipped"] == 1
    for a, b in zip(metrics(alone), metrics(two[kind]), strict=True):
        norms = [record.pop("grad_norm", 0.0) for record in (a, b)]
        if a["step"] == SICK_STEP:
            assert all(not math.isfinite(norm) for norm in norms)
        assert b == pytest.approx(a, rel=1e-4, abs=1e-7)
    assert_students_near(alone, two[kind])


def continued(folder: JobFolder, runs: dict[str, Path], case: str, strategy: str = "zero3") -> JobFolder:
    """A copy of a job at half its steps, to be gone on with under another strategy."""
    name = f"{folder.path.name} on {strategy}, {case}"
    shutil.copytree(folder.path, runs["tied"] / name)
    shutil.rmtree(runs["tied"] / name / "output")
    return make_job(runs, name, case, strategy=strategy, **CONSTANT)


def assert_same_from_half(reference: JobFolder, *folders: JobFolder) -> None:
    for folder in folders:
        for a, b in zip(metrics(reference), metrics(folder), strict=True):
            assert b | {"total": a["total"]} == pytest.approx(a, rel=1e-4, abs=1e-7)
        assert_students_near(reference, folder)


def test_a_checkpoint_goes_on_under_another_strategy(runs, two, single):
    made = [
        continued(two["half fsdp"], runs, "cached"),
        continued(two["half fsdp"], runs, "offload"),
        continued(two["half zero3"], runs, "cached", "fsdp"),
    ]
    alone = continued(two["half offload"], runs, "offload", "single")
    spread(made, 2)
    run(alone)
    assert_same_from_half(single["constant"], *made, alone)


def test_three_ranks_which_divide_nothing_begin_and_go_on(runs, two, single):
    """Parts of small parameters are padded or empty there."""
    whole = {case: make_job(runs, f"{case} three", case) for case in ("align", "cached")}
    half = continued(two["half zero3"], runs, "cached")
    spread([*whole.values(), half], 3)
    for case, folder in whole.items():
        assert_near(single[case], folder)
        assert_students_near(single[case], folder)
    assert_same_from_half(single["constant"], half)


def test_one_process_without_a_launcher_has_all_parts(runs, single):
    folder = make_job(runs, "untied one", "untied")
    run(folder)
    assert_near(single["untied"], folder)
    assert_students_near(single["untied"], folder)


def test_bfloat16_products_over_float32_parameters(runs, two):
    world = {"name": "single", "precision": "bfloat16"}
    alone = training_job(runs["tied"], "bf16 single", "distill", world=world, **{**STEPS, **HALF, **ONLINE})
    run(alone)
    for name in ("bf16", "bf16 offload"):
        losses = [[record["loss"] for record in metrics(folder)[1:]] for folder in (alone, two[name])]
        assert losses[1] == pytest.approx(losses[0], rel=2e-2)
        assert losses[1] != pytest.approx(losses[0], rel=1e-6)
        assert all(tensor.dtype == torch.float32 for tensor in weights(two[name]).values())


def test_bfloat16_rounds_no_parameter(runs, two):
    """A student that does not learn, and what Stage I leaves alone, stay what they were to the last bit."""
    before, still, aligned = (
        weights(JobFolder.read(runs["tied"] / "align")),
        weights(two["bf16 still"]),
        weights(two["bf16 align"]),
    )
    assert any(not tensor.equal(tensor.bfloat16().float()) for tensor in before.values())
    assert all(bool(((still[key] == before[key]) | (before[key] == 0)).all()) for key in before)
    changed = {key for key in before if not aligned[key].equal(before[key])}
    assert changed == {key for key in before if "_map" in key or "_gate." in key}
