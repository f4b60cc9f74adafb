"""Reports: of a run, finished or not, and of any scores."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from eval_support import config, finished_run, job

from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.manifest import Manifest, write_manifest
from xlstm_distill.evaluate import plots, tables, verdict_plots
from xlstm_distill.evaluate.checks import checks
from xlstm_distill.evaluate.collect import collect
from xlstm_distill.evaluate.plots import loss_series
from xlstm_distill.evaluate.report import main, run
from xlstm_distill.evaluate.scores import read_board
from xlstm_distill.evaluate.verdict import Verdicts

PNG = b"\x89PNG\r\n\x1a\n"


def score(value, stderr=0.05, better=True):
    return {"score": value, "stderr": stderr, "higher_is_better": better}


def write_piece(folder, name, kl, scores, samples=None):
    facts = {"heldout": {"prose": {"kl": kl, "perplexity": 8.0 + kl}}, "scores": scores}
    path = folder.piece_path(name)
    path.parent.mkdir(exist_ok=True)
    write_manifest(path, Manifest("eval", "eval", {}, 0, {}, {}, facts))
    positions = {"bucket": 64, "kl": [kl, None, kl], "ce": [1.0, None, 1.0]}
    (folder.output / name).mkdir(exist_ok=True)
    (folder.output / name / "heldout.json").write_text(json.dumps({"prose": {"positions": positions}}))
    for task, values in (samples or {}).items():
        lines = [json.dumps({"id": f"q{i}", "score": value}) for i, value in enumerate(values)]
        (folder.output / name / f"{task}.samples.jsonl").write_text("\n".join(lines))


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
    assert text.startswith("# tiny: students against their teacher\n")  # of either kind
    rows = re.findall(r"^\| ([\w +,]+?) \| \d\.\d{3} \|", text.split("## Tasks")[0], re.MULTILINE)
    assert rows == ["window + sinks, untrained", "aligned", "expert math", "teacher"]
    assert "0.600 ± 0.050" in text
    assert "Not measured yet: merged." in text
    assert "window + sinks, untrained" in capsys.readouterr().out


def test_recovery_and_win_and_tie_of_the_tasks(tiny_run):
    results = collect(tiny_run)
    found = results.comparisons()
    assert found["aligned"].mean_recovery == pytest.approx(0.875)  # (0.6/0.8 + 1) / 2: lower is better stays out
    assert found["math"].win_and_tie(0.0) == 0.5
    assert found["window"].critical_tolerance == 0.0
    assert "teacher" not in found
    header, rows = tables.task_table(results)
    by_name = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
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
    assert names == {
        "heldout.png", "positions.png", "win_tie.png", "recovery.png", "alignment.png", "output_gate.png", "losses.png",
    }  # fmt: skip


def test_perplexity_past_the_training_is_drawn_for_teacher_and_students(tiny_run, monkeypatch):
    task = "local_positions_prose"
    folder = JobFolder.read(tiny_run / "jobs/eval")
    for name, ce in (("aligned", [3.0, None, 2.5]), ("teacher", [2.0, 1.9, 1.8])):
        write_piece(folder, name, 0.1, {task: score(2.0, None, False)})
        found = {"positions": {"edges": [0, 32, 64, 128], "ce": ce}}
        (folder.output / name / f"{task}.json").write_text(json.dumps(found))
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda draw, path: drawn.update({path.stem: draw()}) or False)
    plots.draw_all(collect(tiny_run), None, tiny_run)
    lines = {line.get_label(): line.get_xydata() for line in drawn["long"].axes[0].lines if line.get_label()[0] != "_"}
    assert [tuple(point) for point in lines["teacher"]] == [(16.0, 2.0), (48.0, 1.9), (96.0, 1.8)]
    assert [tuple(point) for point in lines["aligned"]][::2] == [(16.0, 3.0), (96.0, 2.5)]


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


def shares(right, of=20):
    return [1.0] * right + [0.0] * (of - right)


def measured_run(path, students, unions=()):
    """A run of the experts math and code, their generalists and the merge, scored on items."""
    settings = config(tasks=("gsm8k", "mbpp"), experts=("math", "code", *unions))
    experts = {
        name: replace(expert, union_of=("math", "code") if name in unions else ())
        for name, expert in settings.expert.items()
    }
    folder = finished_run(path, replace(settings, expert=experts), pieces=("teacher", *students))
    (path / "graph.json").write_text("{}")
    for name, right in {"teacher": {"gsm8k": 16, "mbpp": 10}, **students}.items():
        scores = {task: score(count / 20) for task, count in right.items()}
        write_piece(folder, name, 0.1, scores, {task: shares(count) for task, count in right.items()})
    return path


FOUR = {
    "math": {"gsm8k": 16, "mbpp": 2}, "code": {"gsm8k": 6, "mbpp": 10}, "generalist": {"gsm8k": 8, "mbpp": 5},
    "merged": {"gsm8k": 15, "mbpp": 9},
}  # fmt: skip


@pytest.mark.slow
def test_the_report_says_per_domain_whether_merging_beats_the_generalist(tmp_path, capsys):
    path = measured_run(tmp_path / "four", FOUR, ("generalist",))
    assert main([str(path)]) == 0
    report = (path / "report" / "report.md").read_text()
    # 15/16 − 8/16 of the teacher's score, the items of all drawn together
    found = re.search(r"math: merged against generalist \| \+0.438 \| \[\+(\S+), \+(\S+)\] \|\s+\| better", report)
    assert 0.1 < float(found[1]) < 0.3 < 0.55 < float(found[2]) < 0.8
    assert "code: merged against code (best and own expert) | −0.100" in report
    assert "no scores per item" not in report
    assert "all tasks: merged against generalist" in capsys.readouterr().out
    assert (path / "report" / "changes.png").read_bytes().startswith(PNG)
    assert json.loads((path / "report" / "win_tie.json").read_text())["merged"]["domains"]["math"]["value"] == 15 / 16


def test_a_generalist_is_called_so_and_not_an_expert(tmp_path):
    results = collect(measured_run(tmp_path / "four", FOUR, ("generalist",)))
    assert [m.label for m in results.students] == ["expert math", "expert code", "generalist", "merged"]
    assert (results.experts, results.unions) == (("math", "code"), {"generalist": ("math", "code")})


@pytest.mark.slow
def test_students_of_other_runs_stand_beside(tmp_path, capsys):
    path = measured_run(tmp_path / "four", FOUR, ("generalist",))
    other = measured_run(tmp_path / "other", {"math": {"gsm8k": 14, "mbpp": 8}})
    assert main([str(path), "--beside", f"{other}:math", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["other:math"]["recovery"] == {"gsm8k": pytest.approx(14 / 16), "mbpp": 0.8}
    assert main([str(path), "--beside", f"{other}:math"]) == 0
    assert "other:math" in (path / "report" / "report.md").read_text()
    assert main([str(path), "--beside", f"{other}:"]) == 2
    assert "--beside other:merged: not measured there" in capsys.readouterr().err


def test_a_student_of_another_teacher_does_not_stand_beside(tmp_path, capsys):
    path, other = (measured_run(tmp_path / name, {"math": {"gsm8k": 14, "mbpp": 8}}) for name in ("a", "b"))
    for run_folder in (path, other):
        job(run_folder, config(), "fetch", "fetch").finish({"teacher": {"weights": run_folder.name}})
    assert main([str(path), "--beside", f"{other}:math"]) == 2
    assert "has another teacher than a" in capsys.readouterr().err


def test_a_task_on_which_a_student_failed_is_listed_as_failed_and_lost(tmp_path):
    path = measured_run(tmp_path / "four", {**FOUR, "code": {"gsm8k": 6}}, ("generalist",))
    (path / "jobs/eval/pieces/code.json").unlink()
    found = {"gsm8k": {"score": score(0.3)}, "task_of_old": {"failed": "long ago"}, "mbpp": {"failed": "out of memory"}}
    for task, about in found.items():
        write_json(path / f"jobs/eval/output/code/{task}.json", {"xdl": {"made": "", **about}})
    write_json(path / "jobs/eval/output/code/heldout.json", {"prose": {"kl": 0.3, "perplexity": 4.0, "more": 1}})
    assert main([str(path)]) == 0
    report = (path / "report" / "report.md").read_text()
    assert "Failed: code: mbpp: out of memory." in report
    assert "long ago" not in report
    assert "Without a score, counted as lost: code: mbpp." in report
    assert collect(path).comparisons()["code"].recovery == {"gsm8k": 0.3 / 0.8, "mbpp": None}
    heldout = {m.name: m.heldout for m in collect(path).models}
    assert heldout["code"] == {"prose": {"kl": 0.3, "perplexity": 4.0}}


def test_a_task_on_which_the_teacher_scores_nothing_is_no_loss_in_the_figure(tmp_path):
    scores = {"teacher": {"a": 0.0, "b": 0.5}, "students": {"s": {"a": 0.1, "b": 0.4}}}
    figure = verdict_plots.recovery(Verdicts(read_board(Path(scores_file(tmp_path, scores)))))
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["teacher: 0", "teacher"]


def test_without_scores_per_item_the_report_says_so(tiny_run):
    main([str(tiny_run)])
    report = (tiny_run / "report" / "report.md").read_text()
    assert "Over samples, recall, cloze: no scores per item" in report


def test_every_figure_of_the_verdict_has_a_legend_with_every_student(tmp_path):
    verdicts = Verdicts(collect(measured_run(tmp_path / "four", FOUR, ("generalist",))).board)
    drawn = {"win_tie": list(FOUR), "recovery": list(FOUR), "changes": ["best", "domain's", "generalist"]}
    for name, students in drawn.items():
        figure = getattr(verdict_plots, name)(verdicts.changes if name == "changes" else verdicts)
        labels = [text.get_text().split()[0] for text in figure.legends[0].get_texts()]
        assert sorted(labels) == sorted(s if s != "domain's" else "the" for s in students)
    curves = verdict_plots.win_tie(verdicts).axes[0]
    math_curve = dict(zip(*(axis.tolist() for axis in curves.lines[0].get_data()), strict=True))
    assert (math_curve[0.0], math_curve[0.5]) == (0.5, 0.5)
    assert curves.lines[0].get_xdata()[-1] == pytest.approx(0.84)  # a little beyond the largest drop, .8


@pytest.mark.slow
def test_a_report_of_scores_needs_neither_torch_nor_transformers(tmp_path):
    path = scores_file(tmp_path, {"teacher": {"a": 0.8}, "students": {"s": {"a": 0.6}}})
    code = f"""if True:
        import sys
        from xlstm_distill.evaluate.report import main
        assert main(["--scores", {path!r}]) == 0
        print({{"torch", "transformers"}} & set(sys.modules))"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "set()"


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


def test_long_names_that_begin_alike_or_end_alike_stay_apart():
    names = [f"local_{kind}_demo_{source}" for kind in ("cloze", "words") for source in ("math", "code")]
    text = tables.as_text((["task", *"abcdefgh"], [[name, *["1.000±.000"] * 8] for name in names]))
    assert len({line.split()[0] for line in text.split("\n\n")[0].splitlines()[2:]}) == 4


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
    assert {"critical_tolerance", "win_and_tie", "recovery", "mean_recovery", "intervals", "domains"} <= set(found["s"])
    assert found["s"]["critical_tolerance"] == 0
    assert found["s"]["win_and_tie"]["0.24"] == pytest.approx(2 / 3)
    assert found["s"]["win_and_tie"]["0.25"] == 1
    assert found["s"]["recovery"] == {"a": pytest.approx(0.75), "b": 1, "c": None}
    assert found["t"]["critical_tolerance"] == 0  # a and c tie, b is missing
    assert found["t"]["win_and_tie"]["1.0"] == pytest.approx(2 / 3)
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.json"]


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


@pytest.mark.parametrize(
    "arguments",
    [[], ["somewhere", "--scores", "x"], ["--scores", "/no/such/file"], ["--scores", "x", "--beside", "run:merged"]],
)
def test_bad_arguments_are_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_expert_is_judged_by_its_own_domain_only():
    from types import SimpleNamespace

    def model(name, math, code):
        return SimpleNamespace(name=name, heldout={"math": {"kl": math}, "code": {"kl": code}})

    distill = {"math": {"validation": {"end": {"math": {"kl": 0.9}}}}, "code": {"validation": {"end": {"code": {}}}}}
    models = [model("aligned", 0.5, 0.5), model("math", 0.9, 0.49), model("code", 0.6, 0.4)]
    found = checks(SimpleNamespace(align={}, models=models, distill=distill))
    assert [passed for passed, _ in found] == [False, True]
    assert "lower on math" in found[0][1]
