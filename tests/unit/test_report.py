"""Reports: of a run, finished or not, and of any scores."""

import json
import re

import pytest
from eval_support import config, finished_run, job

from xlstm_distill.contract.job import World
from xlstm_distill.contract.manifest import Manifest, write_manifest
from xlstm_distill.evaluate import plots, tables
from xlstm_distill.evaluate.collect import checks, collect
from xlstm_distill.evaluate.plots import loss_series
from xlstm_distill.evaluate.report import main, run

PNG = b"\x89PNG\r\n\x1a\n"


def score(value, stderr=0.05, better=True):
    return {"score": value, "stderr": stderr, "higher_is_better": better}


def write_piece(folder, name, kl, scores):
    facts = {"heldout": {"prose": {"kl": kl, "perplexity": 8.0 + kl}}, "scores": scores}
    path = folder.piece_path(name)
    path.parent.mkdir(exist_ok=True)
    write_manifest(path, Manifest("eval", "eval", {}, 0, {}, {}, facts))
    positions = {"bucket": 64, "kl": [kl, None, kl], "ce": [1.0, None, 1.0]}
    (folder.output / name).mkdir(exist_ok=True)
    (folder.output / name / "heldout.json").write_text(json.dumps({"prose": {"positions": positions}}))


@pytest.fixture
def tiny_run(tmp_path):
    """Everything is measured but the merged student."""
    folder = finished_run(tmp_path / "tiny", config())
    for name, kl, recall, ppl in (
        ("window", 0.5, 0.3, 9),
        ("aligned", 0.4, 0.6, 8),
        ("math", 0.3, 0.75, 7),
        ("teacher", 0.0, 0.8, 6),
    ):
        write_piece(folder, name, kl, {"recall": score(recall), "cloze": score(0.9), "ppl": score(ppl, None, False)})
    with (folder.sibling("align") / "metrics.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"time": 0, "step": s, "total": 9, "loss": 1 / (s + 1), "lr": 1}) + "\n" for s in range(9)
        )
    return tmp_path / "tiny"


def test_the_report_holds_every_model_in_order(tiny_run, capsys):
    assert main([str(tiny_run)]) == 0
    text = (tiny_run / "report" / "report.md").read_text()
    rows = re.findall(r"^\| ([\w +,]+?) \| \d\.\d{3} \|", text.split("## Tasks")[0], re.MULTILINE)
    assert rows == ["window + sinks, untrained", "aligned", "expert math", "teacher"]
    assert "0.600 ± 0.050" in text
    assert "Not measured yet: merged." in text
    assert "window + sinks, untrained" in capsys.readouterr().out


def test_recovery_and_win_and_tie_stand_below_the_tasks(tiny_run):
    header, rows = tables.task_table(collect(tiny_run))
    by_name = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert by_name["mean recovery"]["aligned"] == "0.875"  # (0.6/0.8 + 1) / 2: lower is better stays out
    assert by_name["C_0"]["expert math"] == "0.500"
    assert by_name["α*"]["window + sinks, untrained"] == "0.000"
    assert by_name["α*"]["teacher"] == ""
    assert by_name["ppl ↓"]["teacher"] == "6.000"


def test_the_html_needs_no_other_file(tiny_run):
    main([str(tiny_run)])
    page = (tiny_run / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((tiny_run / "report").glob("*.png"))) >= 5
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert all(re.findall(r'<img alt="([^"]*)"', page))


def test_every_figure_is_a_png(tiny_run):
    main([str(tiny_run)])
    names = {path.name for path in (tiny_run / "report").glob("*.png") if path.read_bytes().startswith(PNG)}
    assert names == {"heldout.png", "positions.png", "win_tie.png", "alignment.png", "output_gate.png", "losses.png"}


def test_the_gates_of_aligned_student_and_experts_are_a_map_and_a_table(tiny_run, monkeypatch):
    gates = [[0.02, 0.06], [0.5, 0.9998], [0.3, 0.1], [0.1, 0.2]]
    job(tiny_run, config(), "distill-math", "distill").finish({"output_gate": gates})
    drawn = []
    monkeypatch.setattr(plots, "save", lambda draw, path: drawn.append((path.stem, draw())) or False)
    main([str(tiny_run)])
    maps = dict(drawn)["output_gate"].axes
    assert [axes.get_title() for axes in maps[:2]] == ["aligned", "expert math"]
    found = [axes.images[0] for axes in maps[:2]]
    assert found[0].get_array().T.tolist() == [[0.5, 0.0], [0.2, 0.3]]
    assert found[1].get_array().T.tolist() == gates
    assert {image.get_clim() for image in found} == {(0, 1)}
    assert [[line.get_xydata().tolist() for line in axes.lines[-1:]] for axes in maps[:2]] == [[[[0, 1]]], [[[1, 1]]]]
    assert maps[2].lines[1].get_ydata() == pytest.approx([0.04, 0.7499, 0.2, 0.15])
    report = (tiny_run / "report" / "report.md").read_text()
    assert "| aligned | 0.2500 | 0 (0.250), 1 (0.250) | 1 (0.250), 0 (0.250) | 1 of 4 |" in report
    most, least = "1 (0.750), 2 (0.200), 3 (0.150)", "0 (0.040), 3 (0.150), 2 (0.200)"
    assert f"| expert math | 0.2850 | {most} | {least} | 1 of 8 |" in report
    summary = (tiny_run / "report" / "summary.txt").read_text()
    row = next(line for line in summary.splitlines() if line.startswith("expert math ") and line.endswith("of 8"))
    assert re.split(" {2,}", row)[1:] == ["0.2850", "1 (0.750), 2 (0.200)", "0 (0.040), 3 (0.150)", "1 of 8"]
    assert max(map(len, summary.splitlines())) <= 100


def test_a_run_from_before_gates_were_recorded_has_neither(tiny_run):
    job(tiny_run, config(), "align", "align").finish({"error_before": [0.4, 0.2], "error_after": [0.1, 0.1]})
    assert main([str(tiny_run)]) == 0
    assert not (tiny_run / "report" / "output_gate.png").exists()
    assert "gate" not in (tiny_run / "report" / "report.md").read_text()


def test_the_plain_table_fits_into_a_hundred_columns(tiny_run):
    main([str(tiny_run)])
    lines = (tiny_run / "report" / "summary.txt").read_text().splitlines()
    assert max(len(line) for line in lines) <= 100


def test_the_stage_writes_the_same_to_its_output(tiny_run):
    folder = job(tiny_run, config(), "report", "report", ("align",))
    facts = run(folder, World(), None)
    assert {"report.md", "report.html", "summary.txt"} <= {path.name for path in folder.output.iterdir()}
    assert facts["critical_tolerance"] == {"window": 0, "aligned": 0, "math": 0}
    assert any("layers 1 (0.95)" in line for line in facts["failed_checks"])


def test_the_checks_name_the_layer_and_the_head(tiny_run):
    found = {what: passed for passed, what in checks(collect(tiny_run))}
    layers, mean, heads, *kl = found
    assert "not so in layers 1 (0.95)" in layers
    assert (found[layers], found[mean], found[heads]) == (False, True, False)
    assert heads.endswith("layer.head 0.1")
    assert [found[what] for what in kl] == [True, True]


def test_a_run_that_has_measured_nothing_still_reports(tmp_path, capsys):
    finished_run(tmp_path / "tiny", config())
    assert main([str(tmp_path / "tiny")]) == 0
    assert "not measured yet: window, aligned, math, merged, teacher" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_wide_tables_go_on_below():
    header = ["task", *(f"a long model name {i}" for i in range(8))]
    text = tables.as_text((header, [["a task with a name that is much too long to keep"] + ["1.000"] * 8]))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("1.000") == 8
    assert "…" in text


def test_the_loss_curves_are_losses_and_validation():
    records = [{"time": 0, "step": 1, "total": 2, "loss": 2.0, "lr": 0.1, "validation/prose/kl": 0.5}]
    assert loss_series(records) == {"loss": ([1], [2.0]), "validation/prose/kl": ([1], [0.5])}


def scores_file(tmp_path, content):
    path = tmp_path / "scores.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_scores_of_any_origin_give_the_documented_json(tmp_path, capsys):
    content = {
        "teacher": {"a": 0.8, "b": 0.5, "c": 0.0},
        "students": {"s": {"a": 0.6, "b": 0.5, "c": 0.1}, "t": {"a": 0.8, "c": 0.0}},
    }
    assert main(["--scores", scores_file(tmp_path, content), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"s", "t"}
    assert set(found["s"]) == {"critical_tolerance", "win_and_tie", "recovery"}
    assert found["s"]["critical_tolerance"] == 0
    assert found["s"]["win_and_tie"]["0.24"] == pytest.approx(2 / 3)
    assert found["s"]["win_and_tie"]["0.25"] == 1
    assert found["s"]["recovery"] == {"a": pytest.approx(0.75), "b": 1, "c": None}
    assert found["t"]["critical_tolerance"] == 0  # a and c tie, b is missing
    assert found["t"]["win_and_tie"]["1.0"] == pytest.approx(2 / 3)
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.json"]


def test_scores_without_json_make_a_report_beside_the_file(tmp_path, capsys):
    content = {"teacher": {"a": 0.8}, "students": {"s": {"a": 0.6}}}
    assert main(["--scores", scores_file(tmp_path, content)]) == 0
    assert {path.name for path in (tmp_path / "scores-report").iterdir()} == {"report.md", "report.html", "win_tie.png"}
    assert "0.250" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected {"),
        ({"teacher": {"a": 1}}, "expected {"),
        ({"teacher": {"a": 1}, "students": {"s": [1]}}, "expected {"),
        ({"teacher": {"a": 1}, "students": {}}, "students: none given"),
        ({"teacher": {"a": 1}, "students": {"s": {"a": "x"}}}, "scores of s: a='x'"),
        ({"teacher": {"a": None}, "students": {"s": {"a": 1}}}, "scores of teacher: a=None"),
        ({"teacher": {"a": 1}, "students": {"s": {"b": 1}}}, "b: the teacher has no score"),
    ],
)
def test_a_bad_scores_file_is_one_line(tmp_path, capsys, content, message):
    assert main(["--scores", scores_file(tmp_path, content)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["somewhere", "--scores", "x"], ["--scores", "/no/such/file"]])
def test_bad_arguments_are_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_expert_is_judged_by_its_own_domain_only():
    from types import SimpleNamespace

    from xlstm_distill.evaluate.collect import checks

    def model(name, math, code):
        return SimpleNamespace(name=name, heldout={"math": {"kl": math}, "code": {"kl": code}})

    distill = {"math": {"validation": {"end": {"math": {"kl": 0.9}}}}, "code": {"validation": {"end": {"code": {}}}}}
    models = [model("aligned", 0.5, 0.5), model("math", 0.9, 0.49), model("code", 0.6, 0.4)]
    found = checks(SimpleNamespace(align={}, models=models, distill=distill))
    assert [passed for passed, _ in found] == [False, True]
    assert "lower on math" in found[0][1]
