"""`xdl report --scores`: any scores as JSON or CSV, and a verdict computed by hand."""

import json
import math
from pathlib import Path

import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.evaluate.report import main
from xlstm_distill.evaluate.scores import read_board
from xlstm_distill.evaluate.verdict import Verdicts

# Made up. Recoveries of small: .9, .5, 1.1, .8 → drops .1, .5, 0, .2 → α* = .1, the 2nd of 4.
# Of large: 1, .95, 1, (none) → drops 0, .05, 0, ∞ → α* = 0.
TABLE = """\
task,model,score,stderr,samples,domain,higher_is_better
gsm8k,teacher,0.80,,400,,
gsm8k,small,0.72,,400,,
gsm8k,large,0.80,,400,,
mbpp,teacher,0.60,0.02,,,
mbpp,small,0.30,0.02,,,
mbpp,large,0.57,0.02,,,
poems,teacher,0.50,,,verse,
poems,small,0.55,,,verse,
poems,large,0.50,,,verse,
piqa,teacher,0.75,0.01,,,
piqa,small,0.60,0.01,,,
piqa,large,,,,,
wikitext,teacher,6.2,,,,false
wikitext,small,9.9,,,,false
"""


def write(tmp_path: Path, text: str, name: str = "scores.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_gives_what_a_hand_computes(tmp_path):
    board = read_board(write(tmp_path, TABLE))
    verdicts = Verdicts(board)
    small, large = verdicts.students["small"], verdicts.students["large"]
    assert small.critical_tolerance.value == pytest.approx(0.1)
    assert [small.comparison.win_and_tie(a) for a in (0, 0.05, 0.1, 0.2, 0.5)] == [0.25, 0.25, 0.5, 0.75, 1]
    assert small.mean_recovery.value == pytest.approx((0.9 + 0.5 + 1.1 + 0.8) / 4)
    assert large.critical_tolerance.value == 0
    assert [large.comparison.win_and_tie(a) for a in (0, 0.05, 1)] == [0.5, 0.75, 0.75]
    assert large.comparison.missing == ("piqa",)
    assert board.domains == {"math": ["gsm8k"], "code": ["mbpp"], "verse": ["poems"], "language": ["piqa"]}
    assert board.teacher["gsm8k"].stderr == pytest.approx(math.sqrt(0.8 * 0.2 / 400))
    assert verdicts.spread == {"gsm8k": "normal", "mbpp": "normal", "poems": "none", "piqa": "normal"}


def test_the_same_table_as_json_is_the_same_board(tmp_path):
    lines = [line.split(",") for line in TABLE.splitlines()]
    rows = [{key: cell for key, cell in zip(lines[0], line, strict=True) if cell} for line in lines[1:]]
    for row in rows:
        row |= {key: float(row[key]) for key in ("score", "stderr", "samples") if key in row}
        row |= {"higher_is_better": row.get("higher_is_better") != "false"}
    assert read_board(write(tmp_path, json.dumps(rows), "s.json")) == read_board(write(tmp_path, TABLE))


def test_scores_per_item_are_paired_by_their_ids(tmp_path):
    rows = [
        {"task": "t", "model": "teacher", "score": 0.5, "samples": {"a": 1, "b": 0}},
        {"task": "t", "model": "s", "score": 0.5, "samples": {"b": 0, "a": 1}},
    ]
    verdicts = Verdicts(read_board(write(tmp_path, json.dumps(rows), "s.json")))
    assert verdicts.spread == {"t": "paired"}
    assert verdicts.students["s"].recovery["t"].samples == (1, 1)


def test_students_named_like_a_domain_are_its_experts(tmp_path):
    more = "gsm8k,math,0.8,.01,,,\nmbpp,math,0.1,.01,,,\ngsm8k,merged,0.8,.01,,,\nmbpp,merged,0.6,.01,,,\n"
    board = read_board(write(tmp_path, TABLE + more))
    assert (board.experts, board.unions) == (("math",), ())
    assert {change.against for change in Verdicts(board).changes} == {"math"}


def test_a_file_of_scores_becomes_a_report_beside_it(tmp_path, capsys):
    path = write(tmp_path, TABLE, "made-up.csv")
    assert main(["--scores", str(path)]) == 0
    folder = tmp_path / "made-up-report"
    assert {file.name for file in folder.iterdir()} == {"report.md", "report.html", "win_tie.png", "recovery.png"}
    printed = capsys.readouterr().out
    assert "Without a score, counted as lost: large: piqa." in printed
    assert max(len(line) for line in printed.splitlines() if "─" in line) <= 100
    assert "| small | 0.25 | 0.25 | 0.25 | 0.50 | 0.100 |" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task,score\nt,1\n", "line 1: no column model"),
        ("", "line 1: no column model"),
        ("task,model,score\nt,teacher,high\n", "row 2: score='high': expected a number"),
        ("task,model,score\nt,teacher,1\nt,teacher,1\n", "row 3: teacher has a score on t already"),
        ("task,model,score,notes\nt,teacher,1,x\n", "row 2: notes: not known"),
        ("task,model,score\nt,teacher,1\n", "students: none given"),
        ("task,model,score\nt,s,1\n", "t: the teacher has no score"),
        ("task,model,score\nt,teacher,\nt,s,1\n", "scores of teacher: t=None"),
        ("task,model,score\n,s,1\n", "row 2: expected"),
    ],
)
def test_a_bad_table_is_refused_and_its_row_is_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(Mistake) as caught:
        read_board(path)
    assert str(caught.value).startswith(f"--scores {path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("samples", [{"a": 1, "b": 1}, {"a": "x"}, {}])
def test_scores_per_item_that_are_not_those_of_the_score_are_refused(tmp_path, samples):
    rows = [{"task": "t", "model": "teacher", "score": 0.5, "samples": samples}]
    with pytest.raises(Mistake, match="row 1: samples: expected"):
        read_board(write(tmp_path, json.dumps(rows), "s.json"))
