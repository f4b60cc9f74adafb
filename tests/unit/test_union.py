"""The generalist: one student on the mixtures of several experts together, at the sum of their budgets, not merged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.compose import compose
from launcher.disk import tokens_of
from launcher.plan import plan, states
from launcher.union import with_unions
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.schema import Config, Expert, Source, Teacher

BOTH = ["experts=[math,code,generalist]", "distill.targets=cached"]
SOURCES = {name: Source(path=name, kind="text") for name in "abc"}


def run_of(**experts: Expert) -> Config:
    return Config(Teacher("t", "llama", "folder", "t"), experts=tuple(experts), expert=experts)


def mixture(**weights: float) -> dict[str, Source]:
    return {name: replace(SOURCES[name], weight=weight) for name, weight in weights.items()}


def test_the_proportions_are_the_experts_own_by_their_budgets() -> None:
    config = run_of(
        math=Expert(mixture(a=0.75, b=0.25)), code=Expert(mixture(b=0.5, c=0.5)), both=Expert(union_of=("math", "code"))
    )
    found = with_unions(config).expert["both"]
    assert {name: source.weight for name, source in found.sources.items()} == {"a": 0.375, "b": 0.375, "c": 0.25}
    assert found.union_of == ("math", "code")


def test_the_paper_s_experts_give_each_a_quarter() -> None:
    config = compose(["teacher=llama-3.1-8b-instruct", "experts=[math,code,stem,chat,generalist]"]).config
    sources = config.expert["generalist"].sources
    assert sources["sft_math"].weight == pytest.approx(0.5 / 4)
    assert sources["sft_code"].weight == pytest.approx(0.64 / 4)
    assert sources["nemotron_v1_stem"].weight == pytest.approx(1 / 4)
    assert sources["nemotron_v1_chat"].weight == pytest.approx(0.1 / 4)
    assert sum(source.weight for source in sources.values()) == pytest.approx(1)
    assert plan(config)["distill-generalist"].tokens == 4 * config.distill.tokens == 20_000_000_000


def test_the_merge_takes_the_specialists_and_the_evaluation_both() -> None:
    graph = plan(compose(BOTH).config)
    assert graph["merge"].inputs == ("distill-math", "distill-code")
    assert graph["merge"].identity["experts"] == ["math", "code"]
    assert not any("generalist" in key for key in graph["merge"].identity)
    assert graph["distill-generalist"].inputs == graph["distill-math"].inputs == ("fetch", "align", "cache")
    assert set(graph["eval"].inputs) >= {"distill-math", "distill-code", "distill-generalist", "merge"}
    assert "distill-generalist" in graph["report"].inputs
    assert graph["eval"].pieces == ("teacher", "window", "aligned", "math", "code", "generalist", "merged")


def test_a_generalist_beside_the_experts_changes_nothing_before_the_evaluation() -> None:
    without, beside = plan(compose(["distill.targets=cached"]).config), plan(compose(BOTH).config)
    changed = [job.name for job in without if job.identity != beside[job.name].identity]
    assert changed == ["eval"]
    assert all(job.pieces == beside[job.name].pieces for job in without if job.name != "eval")  # tokenised once


def test_a_finished_run_that_gets_a_generalist_keeps_all_up_to_the_merge(tmp_path: Path) -> None:
    config = compose(["distill.targets=cached"]).config
    for job in plan(config):
        folder = JobFolder(tmp_path / job.name, job, config)
        folder.write()
        for piece in job.pieces or ("",):
            (folder.output / piece).mkdir(parents=True, exist_ok=True)
            (folder.output / piece / "file").write_text(job.name)
        folder.finish({})
    found = states(plan(compose(BOTH).config), tmp_path, anew=("eval",))
    todo = {name: state.kind for name, state in found.items() if not state.done}
    assert todo == {"distill-generalist": "new", "eval": "new", "report": "outdated"}


def test_its_identity_is_its_mixture_and_follows_those_of_its_experts() -> None:
    def weights(*more: str) -> dict[str, float]:
        identity = plan(compose([*BOTH, *more]).config)["distill-generalist"].identity
        return {key: value for key, value in identity.items() if key.endswith(".weight")}

    prefix = "expert.generalist.sources"
    assert weights() == {f"{prefix}.demo_math.weight": 0.5, f"{prefix}.demo_code.weight": 0.5}
    half = "{weight: .5, kind: demo, path: %s}"
    other = f"expert.math.sources={{demo_math: {half % 'math'}, demo_code: {half % 'code'}}}"
    assert weights(other) == {f"{prefix}.demo_math.weight": 0.25, f"{prefix}.demo_code.weight": 0.75}
    longer = plan(compose([*BOTH, "distill.tokens=24576"]).config)["distill-generalist"]
    assert longer.identity == plan(compose(BOTH).config)["distill-generalist"].identity
    assert longer.tokens == 2 * 24576


def test_alone_it_is_the_union_of_all_experts_that_there_are_and_nothing_is_merged() -> None:
    config = compose(["experts=[generalist]"]).config
    assert config.expert["generalist"].union_of == ("math", "code")
    assert (config.specialists, set(config.sources)) == ((), {"demo_math", "demo_code"})
    graph = plan(config)
    assert "merge" not in graph.names
    assert graph["eval"].pieces == ("teacher", "window", "aligned", "generalist")
    with pytest.raises(Mistake, match="stage=merge: this configuration has no such job"):
        plan(replace(config, stage="merge"))
    with pytest.raises(Mistake, match=r"eval.models=merged: this run does not make it \(no expert is merged\)"):
        plan(compose(["experts=[generalist]", "eval.models=[merged]"]).config)


def test_an_expert_of_its_own_data_that_is_called_generalist_is_merged_as_ever() -> None:
    config = compose(["teacher=llama-3.1-8b"]).config
    assert config.specialists == ("generalist",)
    assert plan(config)["merge"].inputs == ("distill-generalist",)


def test_all_means_the_experts_of_the_run_where_it_has_some() -> None:
    one = compose(["experts=[code,generalist]"]).config
    assert one.expert["generalist"].union_of == ("code",)
    named = compose(["experts=[code,generalist]", "expert.generalist.union_of=[math,code]"]).config
    assert named.distill_of("generalist").tokens == 2 * named.distill.tokens == 2 * named.distill_of("code").tokens


def test_the_origin_of_a_computed_value_is_told() -> None:
    origins = compose(BOTH).origins
    assert origins["expert.generalist.sources.demo_math.weight"] == "union of math, code"


def test_plans_count_what_the_generalist_draws(tmp_path: Path) -> None:
    base = ["teacher=llama-3.1-8b-instruct", "cache.max_samples=0"]
    experts, general = (
        compose([*base, f"experts=[{names}]"]).config for names in ("math,code,stem,chat", "generalist")
    )
    drawn = [tokens_of(config, tmp_path)["sft_math"] for config in (experts, general)]
    assert drawn[0] == pytest.approx(drawn[1]) == pytest.approx(1.05 * 0.5 * 5e9 / 0.999)


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ("expert.generalist.union_of=[maths]", "union_of=maths: no such expert; the nearest is math"),
        ("expert.generalist.union_of=[math,generalist]", "union_of=generalist: a union itself"),
        (
            "expert.generalist.sources={demo_math: {weight: 1, kind: demo, path: math}}",
            "has sources of its own and union_of",
        ),
    ],
)
def test_a_union_that_cannot_be_is_refused_in_one_line(expert: str, message: str) -> None:
    with pytest.raises(Mistake) as caught:
        compose([*BOTH, expert])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_union_without_experts_is_refused() -> None:
    with pytest.raises(Mistake, match="there is no other expert"):
        with_unions(run_of(both=Expert(union_of=("all",))))


def test_a_union_of_sources_that_differ_under_one_name_is_refused() -> None:
    half = "{weight: .5, kind: demo, path: code}"
    with pytest.raises(Mistake, match="two sources need two names"):
        compose([*BOTH, f"expert.code.sources={{demo_math: {half}, demo_code: {half}}}"])


def test_that_holds_for_experts_that_the_run_has_not() -> None:
    config = run_of(math=Expert(mixture(a=1.0)), code=Expert(mixture(a=1.0)), both=Expert(union_of=("math", "code")))
    alone = replace(config, experts=("both",))
    assert with_unions(alone).expert["both"].sources["a"] == replace(SOURCES["a"], weight=1.0)
    other = {"a": replace(SOURCES["a"], path="elsewhere", weight=1.0)}
    clash = replace(alone, expert={**alone.expert, "code": Expert(other)})
    with pytest.raises(Mistake, match=r"expert.code.sources.a.path=elsewhere: expert.math.sources.a says a;"):
        with_unions(clash)


@pytest.mark.parametrize(("one", "other", "found"), [(-1, -1, -1), (-1, 7, 7), (9, 7, 9), (9, 0, 0)])
def test_the_larger_token_budget_of_a_shared_source_counts(one: int, other: int, found: int) -> None:
    given = [{"a": replace(SOURCES["a"], weight=1.0, tokens=tokens)} for tokens in (one, other)]
    config = run_of(math=Expert(given[0]), code=Expert(given[1]), both=Expert(union_of=("math", "code")))
    assert with_unions(replace(config, experts=("both",))).expert["both"].sources["a"].tokens == found


def test_the_mixture_is_the_same_at_every_budget_of_all() -> None:
    uneven = run_of(
        math=Expert(mixture(a=0.7, b=0.3)), code=Expert(mixture(b=0.1, c=0.9)), both=Expert(union_of=("math", "code"))
    )
    found = {
        tuple(s.weight for s in with_unions(config).expert["both"].sources.values())
        for tokens in range(4096, 409600, 4096)
        for config in [replace(uneven, distill=replace(uneven.distill, tokens=tokens))]
    }
    assert found == {(0.35, 0.2, 0.45)}


def test_a_budget_of_nothing_is_refused_as_ever() -> None:
    with pytest.raises(Mistake, match=r"distill.tokens=0: expected 1 or more"):
        compose([*BOTH, "distill.tokens=0"])


def test_a_resolved_union_reads_back_as_it_was_written() -> None:
    from dataclasses import asdict

    from xlstm_distill.contract.schema import build

    config = compose(BOTH).config
    again = build(Config, json.loads(json.dumps(asdict(config))))
    assert again.expert["generalist"] == config.expert["generalist"]
    assert again.specialists == ("math", "code")
