"""λ by validation: which candidates, which of them is taken, and that none is written or measured twice."""

import json

import pytest
import torch
from eval_support import NoStop, config, job, samples, save_model, tiny_llama, tiny_tokenizer

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import Merge
from xlstm_distill.evaluate import heldout
from xlstm_distill.evaluate.models import find_model, load_model
from xlstm_distill.merge.candidates import candidates, simplex
from xlstm_distill.merge.measure import Meter
from xlstm_distill.merge.search import choose, verdict
from xlstm_distill.merge.stage import run
from xlstm_distill.merge.table import draw, table
from xlstm_distill.runtime.metrics import read_metrics

NAMES = ("math", "code", "stem")


def test_the_simplex_holds_every_multiple_once_and_the_uniform_mean_first():
    for experts, divisions, count in ((2, 4, 5), (3, 4, 16), (4, 4, 35), (3, 3, 10), (1, 4, 1), (2, 1, 3)):
        grid = list(simplex([str(i) for i in range(experts)], divisions))
        assert len(grid) == count == len({tuple(w.values()) for w in grid})
        assert all(sum(weights.values()) == pytest.approx(1) for weights in grid)
        assert set(grid[0].values()) == {1 / experts}


@pytest.mark.parametrize("methods", [("linear",), ("ties",), ("linear", "ties", "dare_ties")])
def test_the_mean_of_all_and_each_expert_alone_are_always_tried(methods):
    found = candidates(NAMES, 2, methods)
    assert [c.name for c in found[:4]] == ["uniform", "math alone", "code alone", "stem alone"]
    assert all(c.method == "linear" for c in found[:4])
    assert len({c.name for c in found}) == len(found)
    for method in methods:
        assert sum(c.method == method for c in found) == (7 if method == "linear" else 4)
    assert not any(c.name.endswith("alone") for c in found[4:])


def record(name, kl, score=None, stderr=0.1, **weights):
    found = {"name": name, "method": "linear", "weights": weights, "kl": {"a": kl, "b": kl}, "mean_kl": kl}
    return found | ({"score": score, "stderr": stderr} if score is not None else {})


def test_without_tasks_the_lowest_kl_is_taken_and_the_reason_says_so():
    records = [record("uniform", 0.5), record("math alone", 0.3), record("mixed", float("nan"))]
    assert choose(records) == (1, "the lowest mean held-out KL, 0.3000 nats per token, of 3 candidates")


def test_with_tasks_the_lowest_kl_of_those_within_a_standard_error_of_the_best_is_taken():
    records = [record("a", 0.1, 0.30), record("b", 0.4, 0.55), record("c", 0.3, 0.52), record("d", 0.5, 0.6)]
    chosen, why = choose(records)
    assert chosen == 2
    assert "of the 3 of 4 candidates whose mean score is within a standard error (0.1000) of the best (0.6000)" in why


def test_the_uniform_mean_wins_where_nothing_is_better():
    assert choose([record("uniform", 0.3), record("math alone", 0.3)])[0] == 0


def test_the_verdict_names_the_chosen_beside_the_uniform_mean_and_the_best_expert():
    records = [
        record("uniform", 0.5, math=0.5, code=0.5),
        record("math alone", 0.7, math=1.0, code=0.0),
        record("code alone", 0.6, math=0.0, code=1.0),
        record("0.25 math", 0.4, math=0.25, code=0.75),
    ]
    found = verdict(records)
    assert (found["chosen"]["name"], found["uniform"]["mean_kl"], found["best_single"]["name"]) == (
        "0.25 math", 0.5, "code alone",
    )  # fmt: skip
    assert found["chosen"]["weights"] == {"math": 0.25, "code": 0.75}


def test_the_table_has_a_line_per_candidate_and_marks_the_chosen_one():
    lines = table([record("uniform", 0.5, 0.25), record("math alone", 0.3, 0.5)], 1).splitlines()
    assert lines[0].split() == ["candidate", "KL", "a", "KL", "b", "mean", "KL", "score"]
    assert lines[1].split() == ["uniform", "0.5000", "0.5000", "0.5000", "0.2500"]
    assert lines[2].split() == ["*", "math", "alone", "0.3000", "0.3000", "0.3000", "0.5000"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_figure_is_a_triangle_for_three_experts_and_bars_otherwise(tmp_path, count, monkeypatch):
    import matplotlib.figure

    shapes = []
    keep = matplotlib.figure.Figure.savefig

    def seen(figure, *args, **kwargs):
        shapes.append((len(figure.axes[0].collections), len(figure.axes[0].patches)))
        return keep(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", seen)
    found = candidates([f"e{i}" for i in range(count)], 2, ("linear", "ties"))
    records = [record(c.name, 0.3 + i / 50, **c.weights) | {"method": c.method} for i, c in enumerate(found)]
    draw(records, 0, tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert shapes == [(1, 0)] if count == 3 else [(0, len(records))]


@pytest.fixture
def held_out(monkeypatch):
    """Held-out samples in memory, as many as are asked for; tells which were."""
    asked = []

    def read(folder, count, first=0):
        asked.append((count, first))
        return samples(min(count, 4), length=40, seed=first)

    monkeypatch.setattr("xlstm_distill.data.stream.read_samples", read)
    monkeypatch.setattr("xlstm_distill.data.shards.count_samples", lambda folder: 1000)
    return asked


def search_job(path, **settings):
    """Two experts of one start around which the teacher lies: halfway between them is best."""
    run_config = config(experts=("math", "code"), merge=Merge(search=4, **settings))
    tokenizer = tiny_tokenizer()
    start = tiny_llama(1)
    fetch = job(path, run_config, "fetch", "fetch")
    tokenize = job(path, run_config, "tokenize", "tokenize", ("fetch",))
    align = job(path, run_config, "align", "align", ("fetch", "tokenize"))
    experts = [job(path, run_config, f"distill-{name}", "distill", ("align",)) for name in ("math", "code")]
    moved = {name: 0.4 * value.std() * torch.randn_like(value) for name, value in start.state_dict().items()}
    for folder, factor in ((align, 0.0), (experts[0], 1.0), (experts[1], -1.0), (fetch, 0.0)):
        model = tiny_llama(1)
        model.load_state_dict({name: value + factor * moved[name] for name, value in start.state_dict().items()})
        save_model(folder.output / ("teacher" if folder is fetch else "student"), model, tokenizer)
    (tokenize.output / "shards").write_text("in memory")
    for folder in (fetch, tokenize, align, *experts):
        folder.finish({})
    steps = ("align",) if settings.get("methods") else ()
    return job(path, run_config, "merge", "merge", ("fetch", "tokenize", *steps, "distill-math", "distill-code"))


def records_of(folder):
    return json.loads((folder.output / "search.json").read_text())


def test_the_best_weights_are_found_written_and_explained(tmp_path, held_out):
    folder = search_job(tmp_path)
    facts = run(folder, World(), NoStop())
    assert facts["weights"] == {"math": 0.5, "code": 0.5}
    assert facts["search"]["chosen"]["name"] == "uniform"
    assert facts["search"]["chosen"]["mean_kl"] < 1e-6 < facts["search"]["best_single"]["mean_kl"]
    found = records_of(folder)
    assert [r["name"] for r in found["records"][:3]] == ["uniform", "math alone", "code alone"]
    assert len(found["records"]) == facts["search"]["candidates"] == 5
    assert sorted(path.name for path in folder.output.iterdir()) == ["search.json", "search.png", "student"]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["search.jsonl"]


def test_the_numbers_are_those_of_the_merge_once_it_is_written(tmp_path, held_out):
    folder = search_job(tmp_path, methods=("linear", "ties", "slerp"), scale=0.7)
    run(folder, World(), NoStop())
    folder.finish({})
    found = records_of(folder)
    place = find_model(tmp_path / "jobs", folder.config, "merged")
    merged, teacher = load_model(place), load_model(find_model(tmp_path / "jobs", folder.config, "teacher"))
    sample = heldout.Sample(*(lambda batch: (batch.tokens, batch.mask))(samples(4, length=40, seed=4)))
    hidden = [heldout.final_hidden(model, sample.tokens[:, :-1], 3) for model in (merged, teacher)]
    heads = [model.get_output_embeddings().weight.detach() for model in (merged, teacher)]
    direct = heldout.measure(hidden[0], heads[0], sample, heldout.Reference(hidden[1], heads[1]))["kl"]
    chosen = next(r for r in found["records"] if r["name"] == found["chosen"]["name"])
    assert chosen["kl"] == {"prose": pytest.approx(direct, rel=1e-6, abs=1e-9)}
    assert {r["method"] for r in found["records"]} == {"linear", "ties", "slerp"}


def test_the_search_looks_at_other_sequences_than_the_evaluation(tmp_path, held_out):
    folder = search_job(tmp_path)
    run(folder, World(), NoStop())
    assert held_out == [(4, 4)]
    assert records_of(folder)["shared_with_eval"] == []


@pytest.mark.parametrize(("held", "first"), [(8, 4), (7, 3), (4, 0), (2, 0)])
def test_where_too_few_others_are_left_the_last_are_taken_and_it_is_said(tmp_path, monkeypatch, held_out, held, first):
    monkeypatch.setattr("xlstm_distill.data.shards.count_samples", lambda folder: held)
    folder = search_job(tmp_path)
    run(folder, World(), NoStop())
    assert held_out == [(4, first)]
    assert records_of(folder)["shared_with_eval"] == ([] if held == 8 else ["prose"])


def test_a_damaged_shard_behind_the_evaluations_sequences_ends_the_search(tmp_path, monkeypatch, held_out):
    def damaged(folder, count, first=0):
        raise Mistake("shard.00001.mds: damaged")

    monkeypatch.setattr("xlstm_distill.data.stream.read_samples", damaged)
    with pytest.raises(Mistake, match="damaged"):
        run(search_job(tmp_path), World(), NoStop())


def test_numbers_of_another_precision_do_not_count(tmp_path, monkeypatch):
    folder = search_job(tmp_path)
    here = Meter(folder, None, NoStop()).made_from
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Meter(folder, None, NoStop()).made_from != here  # bfloat16 there, float32 here


def test_progress_counts_batches_of_candidates_and_then_tensors(tmp_path, held_out):
    folder = search_job(tmp_path)
    facts = run(folder, World(), NoStop())
    total = 5 * 2 + facts["tensors"]  # 4 sequences in batches of 3
    assert [(r["step"], r["total"]) for r in read_metrics(folder.path)] == [(i + 1, total) for i in range(total)]


class StopAt:
    """Asks to stop at the n-th question."""

    def __init__(self, number):
        self.left = number

    def check(self):
        self.left -= 1
        if self.left == 0:
            raise Stopped


def test_a_search_goes_on_at_the_candidate_where_it_was_ended(tmp_path, held_out, monkeypatch):
    whole = search_job(tmp_path / "whole")
    expected = run(whole, World(), NoStop())
    folder, measured = search_job(tmp_path / "broken"), []
    measure = Meter.measure
    monkeypatch.setattr(Meter, "measure", lambda meter, recipe: measured.append(recipe) or measure(meter, recipe))
    tensors = expected["tensors"]
    with pytest.raises(Stopped):
        run(folder, World(), StopAt(2 + 2 * (tensors + 2) + 5))  # the teacher's batches, two candidates, some tensors
    assert len(measured) == 3
    assert list(folder.output.iterdir()) == []
    again = run(folder, World(), NoStop())
    assert len(measured) == 3 + 3  # the third again, the fourth, the fifth
    assert again == expected
    assert records_of(folder)["records"] == records_of(whole)["records"]


def test_candidates_of_other_settings_are_measured_anew(tmp_path, held_out):
    from dataclasses import replace

    folder = search_job(tmp_path)
    run(folder, World(), NoStop())
    other = replace(folder, config=replace(folder.config, eval=replace(folder.config.eval, samples=3)))
    run(other, World(), NoStop())
    assert len((folder.checkpoints / "search.jsonl").read_text().splitlines()) == 10


@pytest.mark.slow
def test_tasks_are_scored_in_memory_and_come_first(tmp_path, held_out, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = search_job(tmp_path, tasks=("local_recall", "local_addition"))
    facts = run(folder, World(), NoStop())
    found = records_of(folder)["records"]
    assert all(set(r["scores"]) == {"local_recall", "local_addition"} for r in found)
    for r in found:
        assert r["score"] == pytest.approx(sum(score["score"] for score in r["scores"].values()) / 2)
    assert "whose mean score is within a standard error" in facts["search"]["why"]


def test_tasks_are_asked_as_the_evaluation_asks_them(tmp_path, held_out, monkeypatch):
    from dataclasses import replace

    from xlstm_distill.contract.exitcode import Mistake
    from xlstm_distill.evaluate.results import Result
    from xlstm_distill.evaluate.suites import Asked

    seen = []

    def evaluate(model, tokenizer, asked, local, batch):
        seen.append(asked)
        return Result({}, {"score": 0.5, "stderr": 0.1, "higher_is_better": True})

    monkeypatch.setattr("xlstm_distill.evaluate.lm.evaluate", evaluate)
    folder = search_job(tmp_path, tasks=("piqa", "humaneval"))
    asked = replace(
        folder.config.eval, shots={"piqa": 3}, max_new_tokens={"humaneval": 9}, chat=True, allow_code_execution=False
    )
    forbidden = replace(folder, config=replace(folder.config, eval=asked))
    with pytest.raises(Mistake, match=r"allow it with eval\.allow_code_execution=true, or leave the task out"):
        run(forbidden, World(), NoStop())
    allowed = replace(folder, config=replace(folder.config, eval=replace(asked, allow_code_execution=True)))
    monkeypatch.setattr("xlstm_distill.merge.search.check_tasks", lambda tasks, code, key: None)
    run(allowed, World(), NoStop())
    common = {"chat": True, "limit": asked.limit, "seed": folder.config.seed}
    assert seen == 5 * [Asked("piqa", shots=3, **common), Asked("humaneval", max_new_tokens=9, **common)]
    assert all(asked.code is True for asked in seen)
