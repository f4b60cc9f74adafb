"""What a launch misses on this machine before it starts."""

import json
from pathlib import Path

import pytest

from launcher import here
from launcher.cli import main
from launcher.compose import compose
from launcher.here import lacking

EVERY = ("fetch", "tokenize", "cache", "align", "distill", "merge", "eval")


def lines(*overrides: str, stages: tuple[str, ...] = EVERY) -> list[str]:
    return lacking(compose(["cluster=local", *overrides]).config, stages)


def test_the_demo_lacks_nothing() -> None:
    assert lines() == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.init_from=/not/here", "student.init_from=/not/here: no such folder; give another, or --force"),
        ("data.shards=/not/here", "data.shards=/not/here: no such folder"),
        (
            "expert.math.sources.own={kind: jsonl, path: /not/here/*.jsonl}",
            "source own: no file matches path=/not",
        ),
        ("expert.math.sources.own={kind: text, path: /tmp}", "it is a folder: add /*"),
    ],
)
def test_files_that_are_not_there_are_named(override: str, message: str) -> None:
    weights = ["expert.math.sources.demo_math.weight=0", "expert.math.sources.own.weight=1"]
    (line,) = lines(override, *(weights if "own" in override else []))
    assert message in line


def test_files_are_not_looked_for_once_their_tokens_are_there_or_in_a_store(tmp_path: Path) -> None:
    own = ["~expert.math.sources.demo_math", "expert.math.sources.own={kind: jsonl, path: /not/here}"]
    assert lines(*own) != []
    assert lines(*own, stages=("align", "distill")) == []
    assert lines(*own, f"data.shards={tmp_path}") == []
    assert lines(*own, "data.shards=s3://bucket/tokens") == []


def test_a_folder_of_the_teacher_is_looked_for() -> None:
    folder = ["teacher.source=folder", "teacher.path=/not/here"]
    assert lines(*folder)[0].startswith("teacher.path=/not/here: no such folder")
    assert lines(*folder, stages=("align",)) == []


def test_gpus_that_this_machine_has_not_are_refused_for_local_runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "_count_gpus", lambda: 2)
    monkeypatch.setattr("shutil.which", lambda name: None)
    asked = ["cluster.stages.distill.gpus_per_node=4", "cluster.stages.align.gpus_per_node=2"]
    (line,) = lines(*asked)
    assert line.startswith("distill: up to 4 GPUs, and this machine has 2; give --gpus-per-node 2")
    assert lines(*asked, stages=("align",)) == []
    assert lacking(compose(["cluster=slurm", *asked]).config, EVERY) == []


def test_a_misspelt_task_of_lm_eval_is_told_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = lines("eval.tasks=[gms8k,local_recall,gsm8k]")
    assert line == "eval.tasks: gms8k: no task of the installed lm-eval; the nearest is gsm8k, or --force"
    (line,) = lines("merge.search=2", "merge.tasks=[nonexistent_task]", stages=("merge",))
    assert line.startswith("merge.tasks: nonexistent_task:")
    monkeypatch.setattr("xlstm_distill.evaluate.suites._files", dict)  # lm-eval is not installed here
    assert lines("eval.tasks=[gms8k]") == []


def test_names_of_the_shipped_suites_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xlstm_distill.evaluate.suites.names", None)
    assert lines("eval=paper-instruct", "eval.allow_code_execution=true") == []


def test_launch_refuses_plan_says_so_and_a_dry_run_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["cluster=local", "student.init_from=/not/here"]
    assert main(["launch", *asked]) == main(["plan", *asked]) == 2
    assert capsys.readouterr().err.count("error: student.init_from=/not/here: no such folder") == 2
    assert main(["launch", "--dry-run", *asked]) == 0
    assert "warning: student.init_from=/not/here" in capsys.readouterr().err
    code = ["cluster=local", "eval.tasks=[humaneval]"]
    assert main(["plan", *code]) == 2
    assert "run programs that the model writes" in capsys.readouterr().err
    assert main(["plan", "--json", *code]) == 2
    assert json.loads(capsys.readouterr().out)["refused"]
