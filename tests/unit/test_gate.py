"""`xdl gate`: an exit code for scripts, and the task that decided."""

import json

import pytest
from eval_support import config, finished_run, job

from launcher.cli import main as xdl
from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.manifest import Manifest, read_manifest, write_manifest
from xlstm_distill.evaluate.gate import main

TEACHER = {"a": 0.8, "b": 0.5, "c": 0.4, "d": 0.6, "ppl": 6.0}
MERGED = {"a": 0.8, "b": 0.49, "c": 0.36, "d": 0.12, "ppl": 7.0}  # drops 0, .02, .1, .8: α* = .02
MATH = {"a": 0.8, "b": 0.5, "d": None}  # drops 0, 0, ∞, ∞: α* = 0


@pytest.fixture
def scores(tmp_path):
    content = {"teacher": TEACHER, "students": {"merged": MERGED, "math": MATH}, "lower_is_better": ["ppl"]}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    return f"--scores={path}"


@pytest.mark.parametrize(
    ("conditions", "code", "said"),
    [
        (["--max-critical-tolerance=0.05"], 0, "pass merged: α* 0.020 ≤ 0.05: decided by b"),
        (["--max-critical-tolerance=0.02"], 0, "(number 2 of 4 by drop)"),
        (["--max-critical-tolerance=0.01"], 1, "FAIL merged: α* 0.020 > 0.01: decided by b"),
        (["--min-recovery=c=0.9"], 0, "pass merged: recovery of c 0.900 ≥ 0.9"),
        (["--min-recovery=c=0.91"], 1, "FAIL merged: recovery of c 0.900 < 0.91"),
        (["--max-critical-tolerance=0.05", "--min-recovery=d=0.5", "--min-recovery=a=1"], 1, "recovery of d 0.200 <"),
        (["--student=math", "--max-critical-tolerance=0"], 0, "without a score, counted as lost: c, d"),
        (["--student=math", "--min-recovery=d=0.1"], 1, "recovery of d: no score, counted as lost"),
    ],
)
def test_the_exit_code_says_whether_every_condition_holds_and_the_line_which_task_decided(
    scores, capsys, conditions, code, said
):
    assert main([scores, *conditions]) == code
    assert said in capsys.readouterr().out


def test_json_has_the_conditions_and_what_decided_them(scores, capsys):
    asked = ["--max-critical-tolerance=0.05", "--min-recovery=d=0.5", "--json"]
    assert main([scores, *asked]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["student"], told["holds"], told["without_score"]) == ("merged", False, [])
    short = [[c[key] for key in ("condition", "task", "bound", "found", "holds")] for c in told["conditions"]]
    assert short == [
        ["max_critical_tolerance", "b", 0.05, pytest.approx(0.02), True],
        ["min_recovery", "d", 0.5, pytest.approx(0.2), False],
    ]
    assert main([scores, "--student=math", "--min-recovery=d=0.1", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["conditions"][0]["found"], told["without_score"]) == (None, ["c", "d"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no condition"),
        (["--student=code", "--max-critical-tolerance=0.9"], "--student code: has no scores; there are merged, math"),
        (["--min-recovery=aa=0.9"], "--min-recovery aa: no such task; the nearest is a"),
        (["--min-recovery=ppl=0.9"], "lower is better there"),
        (["--min-recovery=0.9"], "expected TASK=RECOVERY"),
        (["--min-recovery=a=much"], "expected a number of 0 or more"),
        (["--max-critical-tolerance=-1"], "expected a number of 0 or more"),
        (["--max-critical-tolerance=5"], "every student passes; expected a share below 1"),
        (["--max-critical-tolerance=nan"], "expected a number of 0 or more"),
        (["somewhere", "--max-critical-tolerance=0.1"], "give a run or --scores FILE"),
    ],
)
def test_the_user_s_mistake_is_one_line_and_exit_code_two(scores, capsys, arguments, message):
    assert main([scores, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_most_tasks_without_a_score_fail_at_every_tolerance(tmp_path, capsys):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"teacher": {"a": 1, "b": 1, "c": 1}, "students": {"merged": {"a": 1}}}))
    assert main([f"--scores={path}", "--max-critical-tolerance=0.9"]) == 1
    assert "α* ∞ > 0.9: decided by b, which has no score" in capsys.readouterr().out


def test_a_task_on_which_the_teacher_scores_nothing_is_a_tie(tmp_path, capsys):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"teacher": {"a": 0}, "students": {"merged": {"a": 0}}}))
    assert main([f"--scores={path}", "--min-recovery=a=0.9"]) == 0
    assert "the teacher scores 0, a tie" in capsys.readouterr().out


def measured(folder, name, scores, inputs=()):
    """A finished piece of `eval`, made from the jobs `inputs` as they stand."""
    digests = {job: read_manifest(folder.sibling(job) / "manifest.json").digest for job in inputs}
    facts = {"scores": {task: {"score": value, "stderr": 0.01} for task, value in scores.items()}}
    folder.piece_path(name).parent.mkdir(exist_ok=True)
    write_manifest(folder.piece_path(name), Manifest("eval", "eval", {}, 0, digests, {}, facts))


@pytest.fixture
def run(tmp_path):
    folder = finished_run(tmp_path / "runs" / "tiny", config(tasks=("a", "b")))
    (tmp_path / "runs" / "tiny" / "graph.json").write_text("{}")
    measured(folder, "teacher", {"a": 0.5, "b": 0.5}, ["fetch"])
    measured(folder, "aligned", {"a": 0.5, "b": 0.4}, ["align"])
    return folder


def test_a_run_is_judged_by_what_it_measured(run, capsys):
    path = str(run.path.parents[1])
    assert main([path, "--student=aligned", "--max-critical-tolerance=0"]) == 0
    assert main([path, "--student=aligned", "--min-recovery=b=0.9"]) == 1
    assert main([path, "--max-critical-tolerance=0.05"]) == 2
    assert "--student merged: has no scores; there are aligned" in capsys.readouterr().err


def test_scores_of_a_model_that_was_made_again_are_not_judged(run, capsys):
    again = job(run.path.parents[1], config(), "align", "align", ("fetch", "tokenize"))
    (again.output / "student" / "config.json").write_text("{}")
    again.finish({})
    assert main([str(run.path.parents[1]), "--student=aligned", "--max-critical-tolerance=0.9"]) == 2
    assert "aligned was made again since it was scored" in capsys.readouterr().err


def test_a_run_without_scores_of_the_teacher_is_refused(run, capsys):
    run.piece_path("teacher").unlink()
    assert main([str(run.path.parents[1]), "--student=aligned", "--max-critical-tolerance=0.9"]) == 2
    assert "no scores of a teacher and a student on tasks yet (measured: aligned)" in capsys.readouterr().err


def test_a_teacher_that_failed_on_a_task_is_refused_and_a_student_that_did_has_lost_it(run, capsys):
    for name, scores in (("aligned", {"a": 0.5}), ("teacher", {"a": 0.5})):
        run.piece_path(name).unlink()
        (run.output / name).mkdir()
        made = read_manifest(run.sibling("align" if name == "aligned" else "fetch") / "manifest.json").digest
        for task, value in scores.items():
            (run.output / name / f"{task}.json").write_text(
                json.dumps({"xdl": {"key": "k", "made": made, "score": {"score": value}}})
            )
        (run.output / name / "b.json").write_text(json.dumps({"xdl": {"made": made, "failed": "out of memory"}}))
        if name == "aligned":
            assert main([str(run.path.parents[1]), "--student=aligned", "--min-recovery=b=0.1"]) == 1
            assert "no score, counted as lost" in capsys.readouterr().out
    assert main([str(run.path.parents[1]), "--student=aligned", "--max-critical-tolerance=0.9"]) == 2
    assert "the teacher failed on b" in capsys.readouterr().err


def test_scores_of_a_student_that_failed_and_was_made_again_are_not_judged(run, capsys):
    run.piece_path("aligned").unlink()
    made = read_manifest(run.sibling("align") / "manifest.json").digest
    for task, about in (("a", {"score": {"score": 0.5}}), ("b", {"failed": "out of memory"})):
        write_json(run.output / "aligned" / f"{task}.json", {"xdl": {"made": made, **about}})
    judge = [str(run.path.parents[1]), "--student=aligned", "--min-recovery=a=0.9"]
    assert main(judge) == 0
    again = job(run.path.parents[1], config(), "align", "align", ("fetch", "tokenize"))
    (again.output / "student" / "config.json").write_text("{}")
    again.finish({})
    assert main(judge) == 2
    assert "--student aligned: has no scores" in capsys.readouterr().err


def test_a_gate_that_fails_itself_gives_no_verdict(run, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no idea")

    monkeypatch.setattr("xlstm_distill.evaluate.gate.board_of_run", broken)
    assert main([str(run.path.parents[1]), "--max-critical-tolerance=0.9"]) == 70
    assert "RuntimeError: no idea" in capsys.readouterr().err


@pytest.mark.slow
def test_xdl_gate_finds_the_run_and_passes_the_exit_code_on(run):
    runs = f"--runs={run.path.parents[2]}"
    assert xdl(["gate", "tiny", runs, "--student=aligned", "--max-critical-tolerance", "0.05"]) == 0
    assert xdl(["gate", "tiny", runs, "--student=aligned", "--min-recovery", "b=0.9"]) == 1
    assert xdl(["gate", "tiny", runs, "--student=aligned"]) == 2
