"""A configuration becomes a graph of jobs, and each job is compared with what stands on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.compose import compose
from launcher.plan import as_recorded, plan, states
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.state import covers, prepare, state_of

DEMO = compose(["student.window=64", "distill.targets=cached"]).config


def with_key(config: Config, section: str, **values: object) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def finish(config: Config, runs: Path, *names: str) -> None:
    """Make the jobs of these names (all: none given) look finished."""
    for job in plan(replace(config, stage="pipeline")):
        if names and job.name not in names:
            continue
        folder = JobFolder(runs / job.name, job, config)
        folder.write()
        for piece in job.pieces or ("",):
            (folder.output / piece).mkdir(parents=True, exist_ok=True)
            (folder.output / piece / "file").write_text(f"{job.name} {piece} {dict(job.identity)} {job.tokens}")
        folder.finish({})


def test_the_pipeline_has_these_jobs_and_edges() -> None:
    graph = plan(DEMO)
    inputs = {job.name: job.inputs for job in graph}
    assert inputs == {
        "fetch": (),
        "tokenize": ("fetch",),
        "cache": ("fetch", "tokenize"),
        "align": ("fetch", "tokenize"),
        "distill-math": ("fetch", "align", "cache"),
        "distill-code": ("fetch", "align", "cache"),
        "merge": ("distill-math", "distill-code"),
        "eval": ("fetch", "tokenize", "align", "distill-math", "distill-code", "merge"),
        "report": ("eval", "align", "distill-math", "distill-code", "merge"),
    }
    assert graph["cache"].pieces == ("demo_math", "demo_code")
    assert graph["eval"].pieces == ("teacher", "window", "aligned", "math", "code", "merged")
    assert (graph["align"].tokens, graph["merge"].tokens) == (DEMO.align.tokens, 0)
    assert graph["distill-code"].expert == "code"


def test_every_job_comes_after_its_inputs() -> None:
    seen: set[str] = set()
    for job in plan(compose(["teacher=qwen2.5-7b-instruct"]).config):
        assert set(job.inputs) <= seen
        seen.add(job.name)


def test_a_stage_means_itself_and_its_ancestors_and_only_means_itself() -> None:
    align = replace(DEMO, stage="align")
    assert plan(align).names == ("fetch", "tokenize", "align")
    assert plan(align, only=True).names == ("align",)
    assert plan(replace(DEMO, stage="distill"), only=True).names == ("distill-math", "distill-code")
    assert plan(replace(DEMO, stage="fetch")).names == ("fetch",)


def test_online_targets_need_no_cache() -> None:
    graph = plan(with_key(DEMO, "distill", targets="online"))
    assert "cache" not in graph.names
    assert graph["distill-math"].inputs == ("fetch", "align", "tokenize")
    assert graph["distill-math"].identity["distill.loss"] == "full"
    assert "cache.top_k" not in graph["distill-math"].identity
    top = plan(with_key(DEMO, "distill", targets="online", loss="topk"))["distill-math"]
    assert top.identity["cache.top_k"] == DEMO.cache.top_k


def test_a_source_in_parts_has_a_piece_for_each_of_them_when_it_is_tokenised_and_cached() -> None:
    math = replace(DEMO.data.sources["demo_math"], parts=3)
    config = with_key(DEMO, "data", sources={**DEMO.data.sources, "demo_math": math})
    graph = plan(replace(config, experts=("code",)))
    for name in ("tokenize", "cache"):
        assert graph[name].pieces == ("demo_math/0", "demo_math/1", "demo_math/2", "demo_code")


def test_given_shards_in_another_number_of_parts_are_another_cache() -> None:
    """Piece 0 of 2 has other shards than piece 0 of 3, under the same name; without parts the name is another one."""
    made = {}
    for parts in (1, 2, 3):
        sources = {name: replace(source, parts=parts) for name, source in DEMO.data.sources.items()}
        experts = {name: replace(expert, sources=sources) for name, expert in DEMO.expert.items()}
        config = replace(DEMO, expert=experts, data=replace(DEMO.data, shards="/shards", sources=sources))
        made[parts] = plan(config)["cache"].identity
    assert not covers(made[3], made[2])
    assert not covers(made[2], made[3])
    assert covers(made[2], made[1])


def test_paths_take_the_place_of_jobs() -> None:
    graph = plan(with_key(with_key(DEMO, "data", shards="/shards"), "student", init_from="/aligned"))
    assert "tokenize" not in graph.names
    assert "align" not in graph.names
    assert graph["cache"].inputs == ("fetch",)
    assert graph["cache"].identity["data.shards"] == "/shards"
    assert graph["distill-math"].inputs == ("fetch", "cache")
    assert graph["distill-math"].identity["student.init_from"] == "/aligned"
    assert graph["eval"].pieces == ("teacher", "math", "code", "merged")
    assert graph["eval"].inputs == ("fetch", "distill-math", "distill-code", "merge")


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["student.window=32"], {"align"}),
        (["student=linear-attention"], {"align"}),
        (["student.gate_input=hidden"], {"align"}),
        (["student.feature_rope=after"], {"align"}),
        (["student.reset_at_documents=true"], {"align", "cache", "distill-math", "distill-code"}),
        (["align.lr=1e-3"], {"align"}),
        (["distill.lr=1e-3"], {"distill-math", "distill-code"}),
        (["distill.gamma=.5"], {"distill-math", "distill-code"}),
        (["cache.top_k=16"], {"cache"}),
        (["cache.sampler=random"], {"cache"}),
        (["cache.sampler=topk"], {"cache", "distill-math", "distill-code"}),  # what the loss can read changes too
        (["distill.loss=topk"], {"cache", "distill-math", "distill-code"}),
        (["cache.sampler=hybrid", "distill.loss=random"], set()),  # as by itself
        (["data.sequence=1024"], {"tokenize"}),
        (["expert.math.sources.demo_math.parts=2", "data.sources.demo_math.parts=2"], {"tokenize"}),
        (["data.overlap=drop"], set()),
        (["+eval.texts.q={kind: jsonl, path: /q}"], {"tokenize"}),
        (["+eval.texts.q={kind: jsonl, path: /q}", "data.overlap=drop"], {"tokenize"}),
        (["+eval.texts.q={kind: hub, path: some/set}"], {"fetch", "tokenize"}),
        (["teacher.revision=main"], {"fetch"}),
        (["expert.math.merge_weight=.7"], {"merge"}),
        (["eval.samples=3"], {"eval"}),
        (["seed=1"], {"align", "cache", "distill-math", "distill-code"}),
        (["data.sources.demo_math.weight=.3", "data.sources.demo_code.weight=.7"], {"align"}),
        (["align.tokens=9999", "align.micro_batch=1", "align.validate_every=3", "align.checkpoint_every=3"], set()),
        (["strategy=fsdp", "strategy.threads=1", "eval.batch=1", "cache.micro_batch=1"], set()),
        (
            [
                "cluster=slurm",
                "cluster.stages.align.gpus_per_node=4",
                "name=x",
                "student.chunk=32",
                "model.kernel=torch",
            ],
            set(),
        ),
        (["distill.validation_samples=3", "guard.keep=9", "align.validation_samples=1"], set()),
    ],
    ids=lambda value: " ".join(sorted(value)) or "none",
)
def test_a_setting_changes_the_identity_of_the_jobs_that_it_changes_and_of_no_other(
    overrides: list[str], changed: set[str]
) -> None:
    before, after = plan(DEMO), plan(compose(["student.window=64", "distill.targets=cached", *overrides]).config)
    assert {job.name for job in before if job.identity != after[job.name].identity} == changed


def test_a_finished_run_is_done_and_a_longer_budget_extends_it(tmp_path: Path) -> None:
    finish(DEMO, tmp_path)
    assert all(state.done for state in states(plan(DEMO), tmp_path).values())
    longer = with_key(DEMO, "align", tokens=2 * DEMO.align.tokens)
    found = states(plan(longer), tmp_path)
    assert found["tokenize"].done
    assert found["align"].kind == "extend"
    assert found["distill-math"].kind == found["report"].kind == "outdated"
    shorter = with_key(DEMO, "align", tokens=1)
    assert states(plan(shorter), tmp_path)["align"].done


def test_an_output_that_was_damaged_or_an_input_that_was_made_again_is_noticed(tmp_path: Path) -> None:
    finish(DEMO, tmp_path)
    (tmp_path / "tokenize/output/demo_math/file").write_text("cut")
    found = states(plan(DEMO), tmp_path)
    assert found["tokenize"].kind == "outdated"
    assert "file has 3 bytes" in found["tokenize"].reason
    assert found["align"].reason == "tokenize will be made again"
    finish(DEMO, tmp_path, "tokenize")
    assert all(state.done for state in states(plan(DEMO), tmp_path).values())
    (tmp_path / "tokenize/output/demo_math/file").write_text("another text")
    folder = JobFolder.read(tmp_path / "tokenize")
    folder.finish({})
    assert states(plan(DEMO), tmp_path)["align"].reason == "tokenize is not the one that it was made from"


def test_other_settings_in_a_run_are_refused_with_both_values(tmp_path: Path) -> None:
    finish(DEMO, tmp_path)
    with pytest.raises(Mistake) as caught:
        states(plan(with_key(DEMO, "student", window=32)), tmp_path)
    message = str(caught.value)
    assert "student.window is 64 in" in message
    assert "32 now" in message
    assert "--name NEW" in message
    assert "\n" not in message


def test_a_started_job_of_other_settings_is_refused_too_but_not_one_that_made_nothing(tmp_path: Path) -> None:
    job = plan(DEMO)["align"]
    JobFolder(tmp_path / "align", job, DEMO).write()
    other = plan(with_key(DEMO, "student", window=32))["align"]
    assert state_of(tmp_path / "align", other).kind == "new"
    (tmp_path / "align/checkpoints/step-1").mkdir(parents=True)
    assert state_of(tmp_path / "align", job).kind == "begun"
    with pytest.raises(Mistake, match=r"student\.window"):
        state_of(tmp_path / "align", other)


def test_a_run_serves_a_part_of_its_sources(tmp_path: Path) -> None:
    finish(DEMO, tmp_path)
    one = compose(
        [
            "experts=[math]",
            "student.window=64",
            "~data.sources.demo_code",
            "data.sources.demo_math.weight=1",
            "eval.tasks=[local_recall]",
        ]
    ).config
    fetch = plan(one)["fetch"]
    assert state_of(tmp_path / "fetch", fetch).done
    assert as_recorded(fetch, tmp_path / "fetch").identity == plan(DEMO)["fetch"].identity
    assert as_recorded(plan(one)["tokenize"], tmp_path / "tokenize").pieces == ("demo_math", "demo_code")


def test_an_unreadable_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "fetch").mkdir()
    (tmp_path / "fetch/manifest.json").write_text("{")
    with pytest.raises(Mistake, match=r"manifest\.json"):
        states(plan(DEMO), tmp_path)


def test_checkpoints_made_from_other_inputs_are_set_aside(tmp_path: Path) -> None:
    finish(DEMO, tmp_path, "fetch", "tokenize")
    job = plan(DEMO)["align"]
    path = tmp_path / "align"
    prepare(path, job)
    (path / "checkpoints").mkdir()
    (path / "checkpoints/latest").write_text("step-1")
    prepare(path, job)
    assert (path / "checkpoints/latest").exists()
    (tmp_path / "tokenize/output/demo_math/file").write_text("another text")
    JobFolder.read(tmp_path / "tokenize").finish({})
    prepare(path, job)
    assert not (path / "checkpoints").exists()
    assert (path / "stale-1/checkpoints/latest").read_text() == "step-1"
    record = json.loads((path / "inputs.json").read_text())
    manifest = read_manifest(tmp_path / "tokenize/manifest.json")
    assert manifest is not None
    assert record["tokenize"] == manifest.digest


def test_a_damaged_fetch_is_fetched_anew_and_not_certified(tmp_path: Path) -> None:
    finish(DEMO, tmp_path, "fetch")
    path = tmp_path / "fetch"
    file = next(p for p in sorted((path / "output").rglob("*")) if p.is_file())
    file.write_text(file.read_text() + "cut or grown")
    prepare(path, plan(DEMO)["fetch"])
    assert not (path / "output").exists()
    assert not (path / "manifest.json").exists()
    assert (path / "stale-1/output").is_dir()


def test_while_a_job_is_extended_its_old_manifest_is_gone(tmp_path: Path) -> None:
    finish(DEMO, tmp_path, "fetch", "tokenize", "align")
    job = plan(with_key(DEMO, "align", tokens=2 * DEMO.align.tokens))["align"]
    assert prepare(tmp_path / "align", job).kind == "extend"
    assert not (tmp_path / "align/manifest.json").exists()


def test_preparing_a_job_names_the_input_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="align: needs fetch, which is not finished"):
        prepare(tmp_path / "align", plan(DEMO)["align"])
