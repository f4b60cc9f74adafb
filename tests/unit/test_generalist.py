"""A generalist trains on the union at the sum of the budgets, and the merge leaves it out."""

from dataclasses import replace

import pytest
from train_support import SOURCES, TOKENS_PER_STEP, Never, job, make_run, run, weights

from launcher.union import with_unions
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Expert
from xlstm_distill.merge.stage import run as merge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two specialists and their union, distilled."""
    jobs = make_run(tmp_path_factory.mktemp("run"))
    config = JobFolder.read(jobs / "align").config
    one = {name: replace(source, weight=1.0) for name, source in SOURCES.items()}
    mixtures = {"math": Expert({"mine": one["mine"]}), "code": Expert({"yours": one["yours"]})}
    mixtures["both"] = Expert(union_of=("all",))
    short = replace(config.distill, tokens=2 * TOKENS_PER_STEP)
    config = with_unions(replace(config, experts=("math", "both", "code"), expert=mixtures, distill=short))
    folders, facts = {}, {}
    for name in config.experts:
        inputs = ("fetch", "align", "cache")
        folders[name] = job(jobs, f"distill-{name}", config, "distill", inputs=inputs, expert=name)
        facts[name] = run(folders[name])
        folders[name].finish(facts[name])
    return config, folders, facts


def test_it_sees_as_many_tokens_as_its_experts_together_and_all_their_sources(experts):
    _, _, facts = experts
    assert {name: found["tokens"] for name, found in facts.items()} == {
        "math": 2 * TOKENS_PER_STEP, "code": 2 * TOKENS_PER_STEP, "both": 4 * TOKENS_PER_STEP,
    }  # fmt: skip
    assert {name: set(found["validation"]["end"]) for name, found in facts.items()} == {
        "math": {"mine"}, "code": {"yours"}, "both": {"mine", "yours"},
    }  # fmt: skip


def test_the_merge_is_the_mean_of_the_specialists_alone(experts):
    config, folders, _ = experts
    folder = job(folders["math"].path.parent, "merge", config, inputs=("distill-math", "distill-code"))
    found = merge(folder, World(), Never())
    assert found["weights"] == {"math": 0.5, "code": 0.5}
    merged, math, code = (weights(place) for place in (folder, folders["math"], folders["code"]))
    for name, tensor in merged.items():
        assert tensor.allclose((math[name] + code[name]) / 2, atol=1e-7), name
