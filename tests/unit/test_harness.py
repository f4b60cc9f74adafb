"""The `eval` stage on a tiny run, with its held-out samples in memory."""

import json

import pytest
import torch
from eval_support import NoStop, config, finished_run, samples

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import World
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.evaluate import harness, heldout
from xlstm_distill.evaluate.lm import scores_of
from xlstm_distill.evaluate.models import find_model, model_places


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
    assert (folder.output / "teacher" / "hidden-prose.safetensors").is_file()


def test_progress_is_logged_in_units_of_all_models(tmp_path):
    from xlstm_distill.runtime.metrics import read_metrics

    folder = finished_run(tmp_path, config())
    measure_all(folder)
    assert [(r["step"], r["total"]) for r in read_metrics(folder.path)] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_teacher_runs_once_for_all_models(tmp_path, monkeypatch):
    folder = finished_run(tmp_path, config())
    calls = []
    whole = heldout.final_hidden
    monkeypatch.setattr(heldout, "final_hidden", lambda *a: calls.append(1) or whole(*a))
    measure_all(folder)
    assert len(calls) == 2


def test_without_the_teachers_hidden_states_a_student_gets_the_same_numbers(tmp_path):
    folder = finished_run(tmp_path, config())
    first = measure_all(folder)
    (folder.output / "teacher" / "hidden-prose.safetensors").unlink()
    folder.piece_path("aligned").unlink()
    harness.run(folder, World(), NoStop())
    assert read_manifest(folder.piece_path("aligned")).facts == first["aligned"]


def test_what_is_finished_is_not_measured_again_after_a_stop(tmp_path):
    folder = finished_run(tmp_path, config())

    class StopAfter:
        calls = 0

        def check(self):
            self.calls += 1
            if self.calls == 3:  # two batches of the teacher, one of the student
                raise Stopped

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


def test_a_missing_model_folder_is_named(tmp_path):
    folder = finished_run(tmp_path, config(), pieces=("math",))
    with pytest.raises(Mistake, match=r"math: .*distill-math/output/student is not a model folder"):
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
    results = json.loads((folder.output / "aligned" / "results.json").read_text())
    assert set(results["results"]) == set(tasks)


@pytest.mark.slow
def test_lm_evals_perplexity_equals_a_direct_computation(tmp_path, monkeypatch):
    import math

    from xlstm_distill.evaluate.models import load_model, load_tokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("xlstm_distill.evaluate.tasks.publish.PASSAGE", 40)
    folder = finished_run(tmp_path, config(("local_perplexity_prose",)), pieces=("teacher",))
    score = measure_all(folder)["teacher"]["scores"]["local_perplexity_prose"]["score"]
    place = find_model(tmp_path / "jobs", folder.config, "teacher")
    model, tokenizer = load_model(place), load_tokenizer(place)
    lines = (folder.output / "tasks" / "local_perplexity_prose.jsonl").read_text().splitlines()
    nats, size = 0.0, 0
    for text in (json.loads(line)["text"] for line in lines):
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        log_probs = model(tokens[:, :-1]).logits.log_softmax(-1)
        nats -= log_probs.gather(2, tokens[:, 1:, None]).sum().item()
        size += len(text.encode())
    assert score == pytest.approx(math.exp(nats / size), rel=1e-4)
