"""The `eval` stage on a tiny run, with its held-out samples in memory."""

import json
from dataclasses import replace

import pytest
import torch
from eval_support import NoStop, config, finished_run, samples

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import World
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.evaluate import harness, heldout, position
from xlstm_distill.evaluate import results as kept
from xlstm_distill.evaluate.lm import scores_of
from xlstm_distill.evaluate.models import find_model, load_model, load_tokenizer, model_places


@pytest.fixture
def tmp_path(tmp_path):
    """A run beside which nothing else lies: teachers' scores are kept there."""
    return tmp_path / "runs" / "one"


@pytest.fixture(autouse=True)
def held_out(monkeypatch):
    monkeypatch.setattr("xlstm_distill.data.stream.read_samples", lambda folder, count, first=0: samples(min(count, 8)))


def measure_all(folder):
    harness.run(folder, World(), NoStop())
    return {name: read_manifest(folder.piece_path(name)).facts for name in folder.job.pieces}


def test_each_model_gets_a_manifest_with_its_numbers(tmp_path):
    folder = finished_run(tmp_path, config(), pieces=("aligned", "teacher"))
    facts = measure_all(folder)
    assert facts["teacher"]["heldout"]["prose"]["kl"] == 0
    assert facts["aligned"]["heldout"]["prose"]["kl"] > 0.1
    assert all(folder.piece_done(name) for name in folder.job.pieces)
    detail = json.loads((folder.output / "aligned" / "heldout.json").read_text())
    assert len(detail["prose"]["positions"]["kl"]) == 2
    assert len(list((folder.output / ".hidden").glob("prose-*.safetensors"))) == 4
    assert not any("hidden" in name for name in read_manifest(folder.piece_path("teacher")).outputs)


def test_progress_is_logged_in_hundredths_of_all_models(tmp_path):
    from xlstm_distill.runtime.metrics import read_metrics

    folder = finished_run(tmp_path, config())
    measure_all(folder)
    assert [(r["step"], r["total"]) for r in read_metrics(folder.path)] == [
        (75, 200), (99, 200), (100, 200), (175, 200), (199, 200), (200, 200),
    ]  # fmt: skip


def test_the_teacher_runs_once_for_all_models(tmp_path, monkeypatch):
    folder = finished_run(tmp_path, config())
    calls = []
    whole = heldout.final_hidden
    monkeypatch.setattr(heldout, "final_hidden", lambda *a: calls.append(1) or whole(*a))
    measure_all(folder)
    assert len(calls) == 4  # two batches of each


def test_without_the_teachers_hidden_states_a_student_gets_the_same_numbers(tmp_path):
    folder = finished_run(tmp_path, config())
    first = measure_all(folder)
    (folder.output / ".hidden" / "prose-00002.safetensors").unlink()
    (folder.output / "aligned" / ".heldout.key").unlink()
    folder.piece_path("aligned").unlink()
    harness.run(folder, World(), NoStop())
    assert read_manifest(folder.piece_path("aligned")).facts == first["aligned"]


def test_what_is_finished_is_not_measured_again_after_a_stop(tmp_path):
    folder = finished_run(tmp_path, config())

    class StopAfter(NoStop):
        calls = 0

        def requested(self, also=False):
            self.calls += 1
            return self.calls == 5  # the teacher and two batches of it, the student and one batch

    with pytest.raises(Stopped):
        harness.run(folder, World(), StopAfter())
    assert folder.my_pieces(World()) == ["aligned"]
    before = folder.piece_path("teacher").stat().st_mtime_ns
    measure_all(folder)
    assert folder.piece_path("teacher").stat().st_mtime_ns == before


def test_a_model_that_the_run_does_not_have_is_refused(tmp_path):
    folder = finished_run(tmp_path, config(), pieces=("poetry",))
    with pytest.raises(Mistake, match=r"eval.models: poetry: .* there are window, aligned, math, merged, teacher"):
        harness.run(folder, World(), NoStop())


def test_a_model_that_is_not_finished_is_named(tmp_path):
    folder = finished_run(tmp_path, config(), pieces=("math",))
    with pytest.raises(Mistake, match=r"math: not finished .no .*distill-math/manifest.json"):
        harness.run(folder, World(), NoStop())


def test_models_stand_in_the_order_of_the_table(tmp_path):
    places = model_places(tmp_path, config(experts=("math", "code")))
    assert list(places) == ["window", "aligned", "math", "code", "merged", "teacher"]
    assert places["window"].overrides == {"use_mlstm": False, "use_window": True}


def test_an_unfinished_model_is_refused_with_those_that_are_finished(tmp_path):
    finished_run(tmp_path, config())
    with pytest.raises(Mistake, match="merged: is not finished; finished: window, aligned, teacher"):
        find_model(tmp_path / "jobs", config(), "merged")
    with pytest.raises(Mistake, match="poetry: is no model of this run"):
        find_model(tmp_path / "jobs", config(), "poetry")


def test_the_score_of_a_task_is_its_preferred_metric():
    results = {
        "results": {
            "arc": {
                "alias": "arc",
                "acc,none": 0.4,
                "acc_stderr,none": 0.1,
                "acc_norm,none": 0.5,
                "acc_norm_stderr,none": 0.2,
            },
            "ppl": {"byte_perplexity,none": 2.5, "byte_perplexity_stderr,none": "N/A"},
            "group": {"alias": "group"},
        },
        "higher_is_better": {"arc": {"acc": True, "acc_norm": True}, "ppl": {"byte_perplexity": False}},
        "n-samples": {"arc": {"original": 9, "effective": 8}},
    }
    scores = scores_of(results)
    assert scores["arc"] == {
        "score": 0.5,
        "stderr": 0.2,
        "metric": "acc_norm,none",
        "higher_is_better": True,
        "items": 8,
    }
    assert scores["ppl"]["stderr"] is None
    assert scores["ppl"]["higher_is_better"] is False
    assert "group" not in scores


class Tasks:
    """Stands for lm-eval: scores by a rule, and remembers what it was asked."""

    def __init__(self, monkeypatch, broken=()):
        self.asked, self.broken = [], set(broken)
        monkeypatch.setattr(harness, "run_task", self)
        monkeypatch.setattr(harness, "check_tasks", lambda tasks, code: None)
        monkeypatch.setattr("xlstm_distill.evaluate.worker.shared_lm", lambda team, model, *rest: model)

    def __call__(self, model, asked, local):
        self.asked.append(asked.task)
        if asked.task in self.broken:
            raise ValueError(f"first line\n{asked.task} has no data set\n")
        score = {"score": 0.5, "stderr": None, "metric": "acc,none", "higher_is_better": True, "items": 2}
        return kept.Result({"results": {asked.task: {}}}, score, [{"id": "0", "score": 1.0}, {"id": "1", "score": 0.0}])


def test_a_task_is_written_with_its_score_and_a_line_for_each_item(tmp_path, monkeypatch):
    Tasks(monkeypatch)
    folder = finished_run(tmp_path, config(("arc_easy",)))
    facts = measure_all(folder)
    assert facts["aligned"]["scores"]["arc_easy"]["score"] == 0.5
    written = json.loads((folder.output / "aligned" / "arc_easy.json").read_text())
    assert written["results"] == {"arc_easy": {}}
    assert written["xdl"]["score"] == facts["aligned"]["scores"]["arc_easy"]
    lines = (folder.output / "aligned" / "arc_easy.samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": "0", "score": 1.0}, {"id": "1", "score": 0.0}]
    made = read_manifest(folder.sibling("align") / "manifest.json").digest
    assert kept.read_scores(folder.output / "aligned", made) == facts["aligned"]["scores"]
    assert kept.read_scores(folder.output / "aligned", "another's") == {}


def test_where_teachers_scores_cannot_be_shared_they_stand_in_the_run(tmp_path, monkeypatch, capsys):
    Tasks(monkeypatch)
    folder = finished_run(tmp_path, config(("arc_easy",)))
    (folder.path.absolute().parents[2] / kept.SHARED).write_text("a file of somebody else")
    assert measure_all(folder)["teacher"]["scores"]["arc_easy"]["score"] == 0.5
    assert "not kept for other runs" in capsys.readouterr().out


def test_of_two_filters_the_flexible_one_counts():
    values = {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.3}
    score = scores_of({"results": {"gpqa_main_cot_zeroshot": values}})["gpqa_main_cot_zeroshot"]
    assert (score["score"], score["metric"]) == (0.3, "exact_match,flexible-extract")


def test_a_task_that_fails_is_named_at_the_end_and_the_others_go_on(tmp_path, monkeypatch):
    tasks = Tasks(monkeypatch, broken=["gsm8k"])
    folder = finished_run(tmp_path, config(("gsm8k", "arc_easy")))
    line = "ValueError: gsm8k has no data set"
    with pytest.raises(Mistake) as told:
        measure_all(folder)
    assert str(told.value).startswith(f"eval: 2 failed: gsm8k of teacher ({line}); gsm8k of aligned ({line}); ")
    assert tasks.asked == ["gsm8k", "arc_easy"] * 2
    assert read_manifest(folder.piece_path("teacher")) is None
    found = kept.read_scores(folder.output / "teacher", read_manifest(folder.sibling("fetch") / "manifest.json").digest)
    assert found["gsm8k"] == {"failed": line}
    assert found["arc_easy"]["score"] == 0.5

    tasks.asked, tasks.broken = [], set()  # mended: only what failed is asked again
    facts = measure_all(folder)
    assert tasks.asked == ["gsm8k", "gsm8k"]
    assert facts["teacher"]["scores"]["gsm8k"]["score"] == 0.5


def test_a_finished_task_is_not_run_again_after_a_stop(tmp_path, monkeypatch):
    tasks = Tasks(monkeypatch)
    folder = finished_run(tmp_path, config(("arc_easy", "piqa")), pieces=("aligned",))

    def stopping(model, asked, local):
        if asked.task == "piqa":
            raise Stopped
        return tasks(model, asked, local)

    monkeypatch.setattr(harness, "run_task", stopping)
    with pytest.raises(Stopped):
        harness.run(folder, World(), NoStop())
    assert not (folder.output / "aligned" / "piqa.json").exists()
    calls = []
    whole = heldout.final_hidden
    monkeypatch.setattr(heldout, "final_hidden", lambda *a: calls.append(1) or whole(*a))
    monkeypatch.setattr(harness, "run_task", tasks)
    measure_all(folder)
    assert tasks.asked == ["arc_easy", "piqa"]
    assert not calls  # held-out text neither


@pytest.mark.parametrize(
    "change", [{"limit": 3}, {"shots": {"arc_easy": 2}}, {"max_new_tokens": {"arc_easy": 9}}, {"chat": True}]
)
def test_a_task_that_is_asked_otherwise_is_run_again(tmp_path, monkeypatch, change):
    tasks = Tasks(monkeypatch)
    measure_all(finished_run(tmp_path, config(("arc_easy", "piqa")), pieces=("aligned",)))
    settings = config(("arc_easy", "piqa"))
    other = replace(settings, eval=replace(settings.eval, **change))
    folder = finished_run(tmp_path, other, pieces=("aligned",))
    folder.piece_path("aligned").unlink()
    measure_all(folder)
    again = ["arc_easy"] if "shots" in change or "max_new_tokens" in change else ["arc_easy", "piqa"]
    assert tasks.asked == ["arc_easy", "piqa", *again]


def test_a_student_that_was_made_again_is_asked_again(tmp_path, monkeypatch):
    tasks = Tasks(monkeypatch)
    folder = finished_run(tmp_path, config(("arc_easy",)), pieces=("aligned",))
    measure_all(folder)
    align = folder.sibling("align")
    (align / "output" / "new").write_text("other")
    type(folder).read(align).finish({})
    measure_all(folder)
    assert tasks.asked == ["arc_easy", "arc_easy"]


def test_another_run_finds_the_teachers_scores(tmp_path, monkeypatch):
    tasks = Tasks(monkeypatch)
    for name, weights in (("one", "same"), ("two", "same"), ("three", "other")):
        folder = finished_run(tmp_path.parent / name, config(("arc_easy",)))
        fetch = type(folder).read(folder.sibling("fetch"))
        fetch.finish({"teacher": {"weights": weights, "tokenizer": "t"}})
        type(folder).read(folder.sibling("tokenize")).finish({})
        (folder.sibling("align") / "output" / "name").write_text(name)
        type(folder).read(folder.sibling("align")).finish({})
        facts = measure_all(folder)
        assert (folder.output / "teacher" / "arc_easy.samples.jsonl").is_file()
        assert facts["teacher"]["scores"]["arc_easy"]["score"] == 0.5
    assert len(tasks.asked) == 5  # three students, two teachers


def test_a_mistake_in_the_tasks_is_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("xlstm_distill.evaluate.worker.load_model", lambda *a: pytest.fail("loaded"))
    with pytest.raises(Mistake, match="arc_eazy: neither a local task"):
        measure_all(finished_run(tmp_path, config(("arc_eazy",))))
    with pytest.raises(Mistake, match=r"eval\.allow_code_execution"):
        measure_all(finished_run(tmp_path.parent / "two", config(("humaneval",))))


def test_perplexity_by_position_goes_past_the_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(position, "FIRST_EDGE", 64)
    settings = config(("local_positions",))
    folder = finished_run(tmp_path, replace(settings, eval=replace(settings.eval, lengths=(200,))), pieces=("aligned",))
    facts = measure_all(folder)["aligned"]
    found = json.loads((folder.output / "aligned" / "local_positions_prose.json").read_text())
    assert found["positions"]["edges"] == [0, 64, 128, 200]
    whole = samples(8)
    tokens = torch.cat([*whole.tokens[:2, :-1], whole.tokens[2]])[None, :201]
    place = find_model(tmp_path / "jobs", folder.config, "aligned")
    model = load_model(place)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.log_softmax(-1)
    ce = -logits.gather(2, tokens[:, 1:, None])[0, :, 0]
    assert found["positions"]["tokens"][0] == 64 * found["results"]["local_positions_prose"]["sample_len"]
    score = facts["scores"]["local_positions_prose"]
    assert (score["metric"], score["higher_is_better"], score["items"]) == ("perplexity,none", False, 1)
    assert found["positions"]["ce"] == pytest.approx(
        [ce[a:b].mean().item() for a, b in ((0, 64), (64, 128), (128, 200))], rel=1e-4
    )


@pytest.mark.slow
def test_lm_eval_scores_local_tasks_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = ("local_addition", "local_perplexity_prose")
    folder = finished_run(tmp_path, config(tasks))
    monkeypatch.setattr("xlstm_distill.evaluate.tasks.publish.PASSAGE", 40)
    facts = measure_all(folder)
    score = facts["aligned"]["scores"]["local_addition"]
    assert (score["score"], score["higher_is_better"]) == (0.0, True)
    assert facts["teacher"]["scores"]["local_perplexity_prose"]["score"] > 1
    results = json.loads((folder.output / "aligned" / "local_addition.json").read_text())
    assert set(results["results"]) == {"local_addition"}
    lines = (folder.output / "aligned" / "local_addition.samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == [0.0] * 24


@pytest.mark.slow
def test_lm_evals_perplexity_equals_a_direct_computation(tmp_path, monkeypatch):
    import math

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("xlstm_distill.evaluate.tasks.publish.PASSAGE", 40)
    folder = finished_run(tmp_path, config(("local_perplexity_prose",)), pieces=("teacher",))
    score = measure_all(folder)["teacher"]["scores"]["local_perplexity_prose"]["score"]
    place = find_model(tmp_path / "jobs", folder.config, "teacher")
    model, tokenizer = load_model(place), load_tokenizer(place)
    lines = (
        (folder.output / "tasks" / "local_perplexity_prose" / "local_perplexity_prose.jsonl").read_text().splitlines()
    )
    nats, size = 0.0, 0
    for text in (json.loads(line)["text"] for line in lines):
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        log_probs = model(tokens[:, :-1]).logits.log_softmax(-1)
        nats -= log_probs.gather(2, tokens[:, 1:, None]).sum().item()
        size += len(text.encode())
    assert score == pytest.approx(math.exp(nats / size), rel=1e-4)
