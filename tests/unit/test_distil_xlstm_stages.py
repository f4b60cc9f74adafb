"""The second student goes through the stages: what trains and what does not, resume, refusals, jobs, plan."""

import json
from dataclasses import replace

import pytest
import torch
from distil_support import distil_config, distil_job, distil_run, tiny_distil
from model_support import tiny_student, tokens
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from train_support import TOKENS_PER_STEP, After, job, metrics, run, weights

from launcher.caching import choices_of
from launcher.compose import compose
from launcher.estimate import estimates
from launcher.parameters import sizes
from launcher.plan import plan, states
from xlstm_distill.contract.distil_xlstm import Blocks
from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.flops import step_flops
from xlstm_distill.contract.schema import Teacher
from xlstm_distill.evaluate.models import load_model, model_places
from xlstm_distill.merge.folder import ModelFolder, refuse_difference

FROZEN = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def jobs(request, tmp_path_factory):
    return distil_run(tmp_path_factory.mktemp("run"), tied=request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return distil_run(tmp_path_factory.mktemp("untied"))


def initial(jobs):
    return {k: v for f in (jobs / "align/output/student").glob("*.safetensors") for k, v in load_file(f).items()}


def test_align_writes_the_start_and_trains_nothing(jobs):
    aligned = json.loads((jobs / "align/manifest.json").read_text())
    assert aligned["facts"] == {}
    assert not (jobs / "align/output/initial").exists()
    assert not (jobs / "align/checkpoints").exists()


def test_embedding_and_head_stay_to_the_bit_and_everything_else_moves(jobs):
    folder = distil_job(jobs, "whole")
    run(folder)
    before, after = initial(jobs), weights(folder)
    assert before.keys() == after.keys()
    same = {name for name in before if before[name].equal(after[name])}
    assert same == set(FROZEN) & before.keys()


def test_it_learns_and_says_where_its_schedule_stands(untied):
    longer = {"tokens": 25 * TOKENS_PER_STEP, "lr": 1e-2, "schedule": "constant", "validate_every": 0}
    folder = distil_job(untied, "long", **longer)
    facts = run(folder)
    start, end = facts["validation"]["start"]["mine"], facts["validation"]["end"]["mine"]
    assert set(end) == {"ce", "kl", "hidden"}
    assert end["kl"] < start["kl"]
    assert end["hidden"] < start["hidden"]
    records = metrics(folder)
    assert [r["anneal/temperature"] for r in records[1:3]] == pytest.approx([2.0, 1 + 1 / (1 + 0.693147)])
    for r in records[1:]:
        alpha = r["anneal/beta"]
        whole = (0.9 - alpha) * r["loss/ce"] + alpha * r["loss/kl"] + 0.1 * r["loss/hidden"]
        assert r["loss"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[3], [0, 2, 1]])
def test_stopped_and_gone_on_equals_an_unbroken_run_to_the_bit(jobs, stops):
    whole, broken = (distil_job(jobs, f"{kind}-{len(stops)}") for kind in ("unbroken", "broken"))
    facts = run(whole)
    for after in stops:
        with pytest.raises(Stopped):
            run(broken, After(after))
    again = run(broken)
    a, b = weights(whole), weights(broken)
    assert [name for name in a if not a[name].equal(b[name])] == []
    assert metrics(whole) == metrics(broken)
    del facts["tokens_per_s"], again["tokens_per_s"]
    assert facts == again


@pytest.mark.slow
def test_recomputed_activations_and_micro_batches_change_nothing(untied):
    plain = distil_job(untied, "plain")
    again = distil_job(untied, "recomputed", world={"activation_checkpointing": True})
    parts = distil_job(untied, "parts", micro_batch=1)
    for folder in (plain, again, parts):
        run(folder)
    assert metrics(plain) == metrics(again)
    for a, b in zip(metrics(plain), metrics(parts), strict=True):
        assert b == pytest.approx(a, rel=1e-5)


@pytest.mark.slow
def test_bfloat16_products_stay_near(untied):
    exact, half = distil_job(untied, "exact"), distil_job(untied, "half", world={"precision": "bfloat16"})
    for folder in (exact, half):
        run(folder)
    for a, b in zip(metrics(exact)[1:], metrics(half)[1:], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
    before, after = initial(untied), weights(half)
    assert all(after[name].equal(before[name]) for name in FROZEN)


def test_cached_targets_and_a_student_of_the_other_kind_are_refused_in_one_line(untied):
    with pytest.raises(Mistake, match=r"distill.targets=cached: .* which no cache holds; use distill.targets=online"):
        run(distil_job(untied, "cached", targets="cached", loss="topk_tail"))
    folder = distil_job(untied, "hybrid")
    other = replace(folder.config, student=replace(folder.config.student, kind="hybrid"))
    with pytest.raises(Mistake, match=r"student.kind=hybrid: the student in .* is a distil_xlstm"):
        run(job(untied, "hybrid", other, "distill", inputs=("fetch", "align"), expert="math"))


def test_experts_of_different_students_are_not_merged(tmp_path):
    tiny_distil(tmp_path / "a")
    tiny_student(tmp_path / "b", teacher=None)
    with pytest.raises(Mistake, match="do not fit together"):
        refuse_difference(ModelFolder(tmp_path / "a/student"), ModelFolder(tmp_path / "b/student"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["distill.targets=cached"], "distill.targets=cached: student=distil_xlstm learns from the teacher's hidden"),
        (["distill.loss=topk_tail"], "distill.loss=topk_tail, distill.divergence=forward: .* use distill.loss=full"),
        (["student.reset_at_documents=true"], "student.reset_at_documents=true: .* across documents"),
        (["strategy.compile=true"], "strategy.compile=true: .* it would unroll"),
        (["distill.beta_end=0.95"], "distill.beta_end=0.95: expected at most gamma"),
        (["distill.temperature_end=0"], "distill.temperature_end=0.0: expected more than 0"),
        (["distill.hidden=-1"], "distill.hidden=-1.0: expected 0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(settings, told):
    with pytest.raises(Mistake, match=told):
        compose(["student=distil_xlstm", *settings])


def test_one_word_makes_the_demo_a_run_of_the_second_student():
    config = compose(["student=distil_xlstm"]).config
    assert (config.student.kind, config.distill.targets, config.distill.loss) == ("distil_xlstm", "online", "full")
    graph = plan(config)
    assert "cache" not in graph.names
    assert (graph["align"].inputs, graph["align"].tokens) == (("fetch",), 0)
    assert graph["align"].identity == {"student.kind": "distil_xlstm", "seed": 0}
    assert graph["eval"].pieces == ("teacher", "math", "code", "merged")
    identity = graph["distill-math"].identity
    assert {identity[f"distill.{key}"] for key in ("beta_end", "temperature_end", "hidden")} == {0.5, 1.0, 0.1}
    assert "distill.hidden" not in plan(compose([]).config)["distill-math"].identity


def test_the_papers_recipe():
    config = compose(["teacher=qwen2.5-1.5b"]).config
    distill = config.distill
    assert (config.student.kind, config.data.sequence) == ("distil_xlstm", 512)
    assert (distill.lr, distill.schedule, distill.warmup) == (2e-4, "cosine", 0.1)
    assert (distill.beta, distill.beta_end, distill.temperature, distill.temperature_end) == (0.8, 0.5, 2.0, 1.0)
    assert (distill.gamma, distill.hidden) == (0.1, 0.1)
    assert (Blocks(1536, 28).slstm, Blocks(1536, 28).mlstm) == (7, 7)


def test_the_plan_counts_what_it_can_and_leaves_the_rest_unsaid(tmp_path):
    config = compose(["student=distil_xlstm"]).config
    graph = plan(config)
    found = {e.job.name: e for e in estimates(graph, config, tmp_path, states(graph, tmp_path))}
    blocks = Blocks(576, 30).parameters
    known = sizes(config.teacher, config.student)
    assert (known.total, known.trained) == (blocks + 49152 * 576, blocks)
    assert known.teacher == sizes(config.teacher, compose([]).config.student).teacher
    assert found["distill-math"].checkpoint == 12 * blocks
    assert found["merge"].disk.models == 4 * known.total
    assert (found["align"].tokens, found["align"].checkpoint) == (0, 0)
    for name in ("align", "distill-math"):
        assert (found[name].hours, found[name].memory) == (None, None)
    assert choices_of(graph, config, tmp_path) is None


@pytest.mark.parametrize("length", [16, 48])
def test_products_are_counted_exactly(tmp_path, length):
    student = tiny_distil(tmp_path).requires_grad_(False)
    ids = tokens(length)
    with FlopCounterMode(display=False) as counter:
        student(ids)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    counted = sum(n for op, n in counts.items() if "conv" not in op)
    shape = Teacher("x", "llama", "folder", "x", vocab_size=97, **{
        name: getattr(student.config.base, name) for name in ("num_hidden_layers", "hidden_size", "head_dim",
        "num_attention_heads", "num_key_value_heads", "intermediate_size")})  # fmt: skip
    found = step_flops("distill", shape, student.config, length, online=True)
    # torch counts all pairs of positions, the formula those that see each other.
    unseen = 2 * 4 * 64 * (length - (length + 1) / 2)
    assert counted == pytest.approx((found.forward + unseen) * ids.numel())
    head = 2 * 32 * 97
    assert found.backward == 2 * (found.forward - head) + head  # the head is frozen
    assert found.teacher > 0


def test_evaluation_knows_its_models(untied):
    folder = distil_job(untied, "distill-math")
    run(folder)
    folder.finish({})
    places = model_places(untied, distil_config(untied.parent / "shards"))
    assert list(places) == ["math", "merged", "teacher"]
    model = load_model(places["math"])
    hidden = model.base_model(input_ids=tokens(), use_cache=False).last_hidden_state
    assert torch.allclose(hidden @ model.lm_head.weight.T, model(tokens()).logits, atol=1e-5)
