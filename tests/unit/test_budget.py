"""Of each source as much is wanted as is drawn of it; a run that holds less for what it trains now says so."""

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.budget import MARGIN, shortages, with_budgets
from launcher.compose import compose
from launcher.estimate import estimates, refusals
from launcher.plan import plan, states
from launcher.union import with_unions
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.schema import Align, Config, Data, Distill, Eval, Expert, Merge, Source, Teacher

LLAMA = ["teacher=llama-3.1-8b-instruct", "cluster=slurm"]
SOURCES = {name: Source(path=name) for name in "abc"}
HELD = 0.01


def mixture(**weights: float) -> dict[str, Source]:
    return {name: replace(SOURCES[name], weight=weight) for name, weight in weights.items()}


def run_of(**experts: Expert) -> Config:
    """Stage I draws 1000 tokens of `a`; each expert draws 100,000; one sample of 8 is looked at."""
    return Config(
        Teacher("t", "llama", "folder", "t"), experts=tuple(experts), expert=experts,
        data=Data(sources=mixture(a=1.0), sequence=8, validation=HELD), eval=Eval(samples=1),
        align=Align(tokens=1000, validation_samples=1), distill=Distill(tokens=100_000, validation_samples=1),
    )  # fmt: skip


def tokens(config: Config) -> dict[str, int]:
    return {name: source.tokens for name, source in with_budgets(with_unions(config)).sources.items()}


def wanted(drawn: float) -> int:
    return pytest.approx(MARGIN * drawn / (1 - HELD), abs=1)


def test_a_budget_is_what_the_training_that_draws_most_takes_of_the_train_split() -> None:
    config = run_of(math=Expert(mixture(a=0.5, b=0.5)), code=Expert(mixture(b=0.25, c=0.75)))
    assert tokens(config) == {"a": wanted(50_000), "b": wanted(50_000), "c": wanted(75_000)}


def test_a_union_of_experts_that_share_a_source_draws_of_it_for_all() -> None:
    config = run_of(
        math=Expert(mixture(a=0.5, b=0.5)), code=Expert(mixture(b=0.25, c=0.75)), both=Expert(union_of=("all",))
    )
    assert tokens(config) == {"a": wanted(50_000), "b": wanted(75_000), "c": wanted(75_000)}


def test_experts_that_are_not_selected_draw_nothing() -> None:
    config = replace(run_of(math=Expert(mixture(a=0.5, b=0.5)), code=Expert(mixture(b=1.0))), experts=("math",))
    assert tokens(config)["b"] == wanted(50_000)
    assert with_budgets(config).expert["code"].sources["b"].tokens == -1


def test_as_much_is_wanted_as_holds_the_held_out_samples_that_are_looked_at() -> None:
    config = run_of(math=Expert(mixture(b=1.0)))
    few = replace(config, distill=replace(config.distill, tokens=16))
    assert tokens(few) == {"a": wanted(1000), "b": MARGIN * 8 / HELD}
    assert tokens(replace(few, eval=Eval(samples=64)))["b"] == MARGIN * 64 * 8 / HELD
    searched = replace(few, eval=Eval(samples=64), merge=Merge(search=4))
    assert tokens(searched)["b"] == MARGIN * 128 * 8 / HELD


def test_the_papers_recipes_name_no_numbers_and_draw_what_they_train_on() -> None:
    config = compose(LLAMA).config
    assert config.sources["sft_math"].tokens == pytest.approx(1.05 * 0.5 * 5e9 / 0.999)
    assert config.sources["dolmino"].tokens == pytest.approx(1.05 * 655_360_000 / 0.999)
    assert config.sources["nemotron_v2_code"].tokens == pytest.approx(1.05 * 64 * 4096 / 0.001)
    longer = compose([*LLAMA, "distill.tokens=1e10"]).config
    assert longer.sources["sft_math"].tokens == pytest.approx(2 * config.sources["sft_math"].tokens)
    assert longer.sources["dolmino"].tokens == config.sources["dolmino"].tokens
    base = compose(["teacher=llama-3.1-8b"]).config
    assert base.sources["dolmino"].tokens == pytest.approx(1.05 * 5e9 / 0.999)


@pytest.mark.parametrize(("one", "other", "found"), [(500, -1, 500), (-1, 500, 500), (500, 700, 700), (0, 700, 0)])
def test_a_number_that_is_given_counts_and_of_two_mixtures_numbers_the_larger(one: int, other: int, found: int) -> None:
    config = run_of(math=Expert({"a": replace(SOURCES["a"], tokens=other)}))
    config = replace(config, data=replace(config.data, sources={"a": replace(SOURCES["a"], tokens=one)}))
    config = with_budgets(config)
    assert config.data.sources["a"].tokens == config.expert["math"].sources["a"].tokens == found


def test_a_source_whose_size_is_chosen_otherwise_is_taken_whole() -> None:
    limited, demo = replace(SOURCES["b"], limit=10), replace(SOURCES["c"], kind="demo")
    config = run_of(math=Expert({"b": limited}), code=Expert({"c": demo}))
    assert {name: tokens(config)[name] for name in "bc"} == {"b": 0, "c": 0}
    assert {source.tokens for source in compose([]).config.sources.values()} == {0}
    stated = run_of(math=Expert({"b": replace(limited, tokens=5)}))
    assert tokens(stated)["b"] == 5


def test_given_shards_have_no_budget() -> None:
    config = run_of(math=Expert(mixture(b=1.0)))
    given = replace(config, data=replace(config.data, shards="/shards"))
    assert with_budgets(given) == given


def test_the_origin_of_a_budget_is_told() -> None:
    origins = compose(["teacher=llama-3.1-8b"]).origins
    assert origins["data.sources.dolmino.tokens"] == "what is drawn of it"
    given = compose(["teacher=llama-3.1-8b", "data.sources.dolmino.tokens=7e9"]).origins
    assert given["data.sources.dolmino.tokens"] == "command line"
    assert given["expert.generalist.sources.dolmino.tokens"] == "of another mixture"
    assert compose([]).origins["data.sources.demo_math.tokens"] == "all of it"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.sources.demo_math.tokens=-2", "tokens=-2: expected -1 (what is drawn), 0 (all) or more"),
        ("+eval.texts.q={kind: jsonl, path: /q, tokens: 5}", "eval.texts.q.tokens=5: they are looked for whole"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_in_one_line(key: str, message: str) -> None:
    with pytest.raises(Mistake) as caught:
        compose([key])
    assert message in str(caught.value)


BASE = compose(["teacher=llama-3.1-8b", "cluster=slurm", "stage=distill"]).config


def changed(config: Config, **values: int) -> Config:
    """`config` with other settings of its source `dolmino`."""
    expert = config.expert["generalist"]
    data, own = ({"dolmino": replace(m["dolmino"], **values)} for m in (config.data.sources, expert.sources))
    experts = {**config.expert, "generalist": replace(expert, sources=own)}
    return replace(config, data=replace(config.data, sources=data), expert=experts)


def with_tokens(count: int, parts: int = 1) -> Config:
    return changed(BASE, tokens=count, parts=parts)


def finish(config: Config, jobs: Path, *names: str, end: int = 0) -> None:
    """Make these jobs look finished, the source `dolmino` ended at `end` tokens."""
    for job in plan(config):
        if job.name not in names:
            continue
        folder = JobFolder(jobs / job.name, job, config)
        folder.write()
        for piece in job.pieces or ("",):
            (folder.output / piece).mkdir(parents=True, exist_ok=True)
            (folder.output / piece / "file").write_text(f"{job.name} {piece} {end}")
            if piece:
                share = -(-end // config.sources["dolmino"].parts)
                folder.finish({"stopped_at": share if job.stage == "tokenize" else 0}, piece)
        folder.finish({"stopped_at": {"dolmino": end} if end else {}} if job.stage == "fetch" else {})


def short(config: Config, jobs: Path, anew: tuple[str, ...] = ()) -> list[str]:
    graph = plan(config)
    standing = states(graph, jobs, anew)
    return shortages([(job, standing[job.name]) for job in graph], config, jobs)


def test_budgets_are_in_no_identity() -> None:
    before, after = plan(with_tokens(1000)), plan(with_tokens(2000))
    assert [job.identity for job in before] == [job.identity for job in after]


def test_text_for_fewer_tokens_than_are_wanted_now_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    finish(with_tokens(1000), tmp_path, "fetch", "tokenize", end=1000)
    (line,) = short(with_tokens(2000), tmp_path)
    assert line.startswith("fetch: stopped at 1000 tokens of dolmino, and more are wanted now; --restart fetch")
    assert "--force" in line
    assert short(with_tokens(0), tmp_path) == [line]
    assert short(with_tokens(1000), tmp_path) == short(with_tokens(500), tmp_path) == []
    assert short(with_tokens(2000), tmp_path, ("fetch",)) == []


def test_tokens_that_ended_early_in_text_that_holds_more_are_made_anew_alone(tmp_path: Path) -> None:
    finish(with_tokens(1000), tmp_path, "fetch")
    finish(with_tokens(1000), tmp_path, "tokenize", end=1000)
    (line,) = short(with_tokens(2000), tmp_path)
    assert line.startswith("tokenize: stopped at 1000 tokens of dolmino")
    assert "--restart tokenize" in line
    assert short(with_tokens(2000), tmp_path, ("tokenize",)) == []
    assert short(with_tokens(2000), tmp_path, ("fetch",)) == []


def test_pieces_that_are_finished_count_though_the_stage_is_not(tmp_path: Path) -> None:
    finish(with_tokens(1000, 3), tmp_path, "fetch")
    finish(with_tokens(1000, 3), tmp_path, "tokenize", end=1000)
    (tmp_path / "tokenize" / "manifest.json").unlink()
    (tmp_path / "tokenize" / "pieces" / "dolmino" / "2.json").unlink()
    assert states(plan(with_tokens(1000, 3)), tmp_path)["tokenize"].kind == "begun"
    assert short(with_tokens(1002, 3), tmp_path) == []  # 334 of each
    assert len(short(with_tokens(1003, 3), tmp_path)) == 1


def test_pieces_of_other_text_are_made_anew_anyway(tmp_path: Path) -> None:
    finish(with_tokens(1000), tmp_path, "fetch", "tokenize", end=1000)
    finish(with_tokens(2000), tmp_path, "fetch", end=2000)
    assert short(with_tokens(2000), tmp_path) == []


def test_a_source_that_ended_by_itself_is_all_that_there_is(tmp_path: Path) -> None:
    finish(with_tokens(1000), tmp_path, "fetch", "tokenize")
    assert short(with_tokens(2000), tmp_path) == short(with_tokens(0), tmp_path) == []


def test_longer_trainings_want_more_and_finished_ones_nothing(tmp_path: Path) -> None:
    jobs, end = tmp_path / "jobs", BASE.sources["dolmino"].tokens
    finish(BASE, jobs, "fetch", "tokenize", "cache", "align", "distill-generalist", end=end)

    def refused(**settings: Align | Distill | Eval) -> list[str]:
        wanted = with_budgets(changed(replace(BASE, **settings), tokens=-1))
        graph = plan(wanted)
        found = estimates(graph, wanted, tmp_path, states(graph, jobs))
        return [line for line in refusals(found, wanted, tmp_path) if "stopped at" in line]

    assert refused() == refused(align=replace(BASE.align, tokens=10**9)) == []
    assert len(refused(distill=replace(BASE.distill, tokens=10**10))) == 1
    assert refused(distill=replace(BASE.distill, tokens=10**9)) == []
    assert refused(eval=replace(BASE.eval, samples=10**4)) == []  # it has all its trainings
