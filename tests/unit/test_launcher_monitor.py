"""`xdl status` tells how jobs stand from the run folder and from what Slurm says; progress is read from metrics."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import scheduler
from launcher.cli import main
from launcher.monitor import EVERY, run_status, run_statuses, table, watch
from launcher.progress import Lines, describe, duration, last_record
from launcher.runs import locked
from launcher.standing import JobStatus

SQUEUE = """#!/bin/bash
echo "squeue $*" >>"$CALLS"
[ -n "$DEAD" ] && { echo "squeue: error: Unable to contact slurm controller" >&2; exit 1; }
printf '%b' "$QUEUE"
"""
SACCT = """#!/bin/bash
echo "sacct $*" >>"$CALLS"
[ -n "$RECORDS" ] || { echo "Slurm accounting storage is disabled" >&2; exit 1; }
printf '%b' "$RECORDS"
"""
Make = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/r"
    jobs = {name: {"stage": name, "inputs": [], "pieces": [], "tokens": 0} for name in ("fetch", "align")}
    (folder / "jobs/align/logs").mkdir(parents=True)
    (folder / "graph.json").write_text(json.dumps({"jobs": jobs, "edges": []}))
    (folder / "jobs/align/logs/rank-0.log").write_text("first\nlast\n")
    records = [{"time": 1, "step": s, "total": 9, "loss": 2.0 / s, "tokens_per_s": 1234.5} for s in (1, 2)]
    lines = "\n".join(map(json.dumps, [*records, {"step": 3, "total": 9, "kl": 1.0}])) + '\n{"step": 4, "tot'
    (folder / "jobs/align/metrics.jsonl").write_text(lines)
    return folder


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stubs of squeue and sacct that print $QUEUE and $RECORDS; the file with their calls."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("squeue", SQUEUE), ("sacct", SACCT)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in ("QUEUE", "RECORDS", "DEAD"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


@pytest.fixture
def submitted(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a run of one Slurm job, `distill-math` with id 7, whose `ends` holds the given text."""

    def make(ends: str = "", queue: str = "", records: str = "", **job: Any) -> Path:
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / "runs/s"
        path = folder / "jobs/distill-math"
        (path / "logs").mkdir(parents=True, exist_ok=True)
        (path / "submit.sbatch").touch()
        (path / "ends").write_text(ends)
        described = {"stage": "distill", "pieces": [], "id": "7", **job}
        (folder / "graph.json").write_text(json.dumps({"jobs": {"distill-math": described}, "edges": []}))
        monkeypatch.setenv("QUEUE", queue)
        monkeypatch.setenv("RECORDS", records)
        return folder

    return make


def stands(folder: Path) -> tuple[str, str | None]:
    (row,) = run_status(folder)
    return row.state, row.reason


def test_the_last_record_has_the_newest_step_and_the_newest_loss(run: Path) -> None:
    record = last_record(run / "jobs/align")
    assert (record["step"], record["loss"]) == (3, 1.0)
    assert describe(record) == "3/9  loss 1  1,234 tok/s"
    assert last_record(run / "jobs/fetch") == {}
    assert describe({}) == "0/?"


def test_progress_tells_tokens_speed_both_losses_and_the_time_that_is_left(tmp_path: Path) -> None:
    lines = [
        {"step": s, "total": 100, "loss": 1.25, "loss/ce": 2.0, "loss/kl": 0.5, "tokens": s * 4096, "seconds": seconds,
         "tokens_per_s": 812.4}
        for s, seconds in ((10, 9.0), (11, 5.0), (12, 5.2))
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = describe(last_record(tmp_path))
    assert text == "12/100  loss 1.25 (ce 2, kl 0.5)  49.2k tokens  812 tok/s  8 min left"
    assert describe({"step": 7, "total": 7, "pace": 3.0, "tokens": 3.2e9}) == "7/7  3.2B tokens"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (2e6, "23 d")]
)
def test_durations_are_told_in_the_largest_unit_of_which_there_are_two(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        ("7|7|PENDING|Priority\\n", ("queued", "Priority")),
        ("7|7|PENDING|BeginTime\\n", ("queued", "BeginTime")),
        ("7|7|PENDING|Dependency\\n", ("waiting", "Dependency")),
        ("7|7|PENDING|(ReqNodeNotAvail, Unav|ailable:node1)\\n", ("queued", "(ReqNodeNotAvail, Unav|ailable:node1)")),
        ("7|7|RUNNING|None\\n", ("running", None)),
        ("7|7|COMPLETING|None\\n", ("running", "Completing")),
        ("7_[1-2%1]|7|PENDING|JobArrayTaskLimit\\n7_0|7|RUNNING|None\\n", ("running", None)),
        ("7_[1-2%1]|7|PENDING|Resources\\n7_0|7|COMPLETED|None\\n", ("queued", "Resources")),
        ("7_[3]|7|PENDING|Resources\\n7_0|7|FAILED|x\\n7_1|7|RUNNING|None\\n", ("running", "element 0 failed")),
    ],
)
def test_what_is_in_the_queue_has_slurms_reason(submitted: Make, queue: str, expected: tuple[str, str | None]) -> None:
    assert stands(submitted(queue=queue, ends="7 0 100 1\n7_0 0 100 75\n")) == expected


@pytest.mark.parametrize(
    ("ends", "queue", "records", "expected"),
    [
        ("7 0 100 1\n7 1 200 9\n", "", "", ("failed", "exit code 9")),
        ("7 0 100 75\n", "7|7|FAILED|NonZeroExitCode\\n", "", ("stopped", None)),
        ("6 0 100 1\n7 0 100 75\n8 0 100 1\n7 0 tor", "", "", ("stopped", None)),
        ("7_0 0 100 75\n7_1 0 200 3\n", "", "", ("failed", "exit code 3")),
        ("", "7|7|TIMEOUT|TimeLimit\\n", "", ("failed", "TIMEOUT")),
        ("7 0 100 1\n", "", "7|NODE_FAIL|None\\n", ("failed", "NODE_FAIL")),
        ("", "", "7|OUT_OF_MEMORY|None\\n", ("failed", "OUT_OF_MEMORY")),
        ("7 0 100 1\n", "7|7|CANCELLED|None\\n", "", ("cancelled", None)),
        ("", "", "7|CANCELLED by 1000|None\\n", ("cancelled", None)),
        ("", "7|7|CANCELLED|DependencyNeverSatisfied\\n", "", ("cancelled", "DependencyNeverSatisfied")),
        ("7_0 0 100 75\n", "7_0|7|FAILED|x\\n7|7|CANCELLED|JobArrayTaskLimit\\n", "", ("stopped", None)),
        ("7_0 0 100 75\n", "7_0|7|COMPLETED|\\n7_1|7|CANCELLED|None\\n", "", ("cancelled", None)),
        ("7_0 0 100 1\n", "7_0|7|FAILED|x\\n7|7|CANCELLED|x\\n", "", ("failed", "exit code 1")),
        ("7 0 100 75\n7 0 101 cancelled\n", "", "", ("cancelled", None)),
        ("", "", "", ("cancelled", "never started")),
    ],
)
def test_what_has_left_the_queue_without_a_manifest_ended_as_its_ends_and_slurm_say(
    submitted: Make, ends: str, queue: str, records: str, expected: tuple[str, str | None]
) -> None:
    assert stands(submitted(ends, queue, records)) == expected


def test_a_job_that_wrote_and_is_on_no_record_ended_without_a_word(submitted: Make) -> None:
    folder = submitted()
    os.utime(folder / "jobs/distill-math/submit.sbatch", (100, 100))
    (folder / "jobs/distill-math/logs/rank-0.log").write_text("step 1\n")
    assert stands(folder) == ("failed", "ended without a word")


def test_a_manifest_that_cannot_be_read_is_a_failure_of_its_job_alone(submitted: Make) -> None:
    folder = submitted()
    (folder / "jobs/distill-math/manifest.json").write_text("{")
    (row,) = run_status(folder)
    assert row.state == "failed"
    assert "not readable as a manifest" in (row.error or "")


def test_without_an_answer_of_slurm_the_folder_speaks(submitted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAD", "1")
    folder = submitted()
    state, reason = stands(folder)
    assert (state, "Unable to contact" in str(reason)) == ("queued", True)
    job = folder / "jobs/distill-math"
    os.utime(job / "submit.sbatch", (100, 100))
    (job / "heartbeats").mkdir()
    (job / "heartbeats/rank-0.json").write_text("{}")
    assert stands(folder)[0] == "running"
    (job / "ends").write_text(f"7 0 {time.time() + 5:.0f} 4\n")
    assert stands(folder) == ("failed", "exit code 4")
    (job / "ends").write_text("7 0 100 4\n")  # it was started again since
    assert stands(folder)[0] == "running"
    os.utime(job / "heartbeats/rank-0.json", (time.time() - 7200,) * 2)
    assert stands(folder)[0] == "stopped"
    monkeypatch.setenv("PATH", "/nowhere")
    assert str(stands(folder)[1]).endswith("no squeue here")


def test_a_command_that_hangs_does_not_hang_status(submitted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = submitted()
    monkeypatch.setattr(scheduler, "ANSWER_SECONDS", 0.2)
    (folder.parents[1] / "stubs/squeue").write_text("#!/bin/bash\nexec sleep 60\n")
    began = time.monotonic()
    assert stands(folder) == ("queued", "squeue does not answer")
    assert time.monotonic() - began < 30


def test_many_jobs_and_runs_cost_one_call_of_squeue_and_of_sacct(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for run in range(4):
        folder = tmp_path / f"runs/{run}"
        folder.mkdir(parents=True)
        jobs = {f"j{i}": {"stage": "eval", "pieces": [], "id": str(100 * run + i)} for i in range(1, 65)}
        (folder / "graph.json").write_text(json.dumps({"jobs": jobs, "edges": []}))
        folders.append(folder)
    monkeypatch.setenv("QUEUE", "".join(f"{i}|{i}|PENDING|Priority\\n" for i in range(1, 65)))
    began = time.thread_time()
    rows = run_statuses(folders)
    assert time.thread_time() - began < 0.5
    assert [(len(row), row[0].state) for row in rows] == [(64, "queued")] + [(64, "cancelled")] * 3
    first, second = calls.read_text().splitlines()
    assert first.startswith("squeue -h -a --states=all --jobs=1,2,")
    assert second.startswith("sacct -n -P -X --jobs=101,102,")


def test_one_unknown_job_is_asked_for_twice_since_squeue_complains_about_one(submitted: Make, calls: Path) -> None:
    stands(submitted())
    assert "--jobs=7,7 " in calls.read_text().splitlines()[0]


def test_done_jobs_cost_no_call(submitted: Make, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = submitted()
    manifest = {"job": "distill-math", "stage": "distill", "identity": {}, "tokens": 0, "inputs": {}, "outputs": {}}
    (folder / "jobs/distill-math/manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    assert stands(folder) == ("done", None)
    assert calls.read_text() == ""


def test_a_launch_here_runs_the_job_that_it_made_ready_last(run: Path) -> None:
    job = run / "jobs/align"
    states = lambda: {row.name: (row.state, row.reason) for row in run_status(run)}  # noqa: E731
    assert states() == {"fetch": ("waiting", "not launched"), "align": ("stopped", None)}
    with locked(run):
        assert states() == {"fetch": ("waiting", None), "align": ("stopped", None)}
        (job / "config.yaml").touch()
        assert states() == {"fetch": ("waiting", None), "align": ("running", None)}
        (job / "ends").write_text(f"local 0 {time.time() + 1:.3f} 1\n")
        assert states()["align"] == ("failed", "exit code 1")
    (job / "ends").write_text("local 0 100 1\nlocal 0 200 75\n")
    assert states()["align"] == ("stopped", None)


def test_json_has_every_figure_and_null_where_nothing_is_known(
    submitted: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted(queue="7|7|RUNNING|None\\n")
    job, now = folder / "jobs/distill-math", time.time()
    steps = [
        {"time": now - 100 + 10 * s, "step": s, "total": 20, "loss": 1.5, "tokens_per_s": 50.0, "seconds": 8.0}
        for s in range(1, 11)
    ]
    (job / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    starts = [{"event": "start", "time": now - 200, "step": 0}, {"event": "start", "time": now - 50, "step": 5}]
    (job / "ledger.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (job / "checkpoints").mkdir()
    (job / "checkpoints/latest").write_text("step-10")
    os.utime(job / "checkpoints/latest", (now - 300,) * 2)
    assert main(["status", "s", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["folder"]) == ("s", str(folder))
    (row,) = told["jobs"]
    assert row.pop("step_age_s") == pytest.approx(0, abs=5)
    assert row.pop("checkpoint_age_s") == pytest.approx(300, abs=5)
    assert row.pop("goodput") == pytest.approx(10 * 8 / 200, rel=1e-3)
    assert row == {
        "name": "distill-math", "stage": "distill", "expert": "math", "id": "7", "state": "running", "reason": None,
        "step": 10, "total": 20, "loss": 1.5, "tokens_per_s": 50.0, "restarts": 1, "eta_s": 80.0, "rank": None,
        "error": None,
    }  # fmt: skip
    (job / "metrics.jsonl").unlink()
    (job / "ledger.jsonl").unlink()
    (job / "checkpoints/latest").unlink()
    assert main(["status", "--json"]) == 0
    ((row,),) = [one["jobs"] for one in json.loads(capsys.readouterr().out)]
    assert {key for key, value in row.items() if value is not None} == {"name", "stage", "expert", "id", "state"}


def test_elements_side_by_side_count_pieces_and_have_no_time_left(submitted: Make) -> None:
    folder = submitted(queue="7_1|7|RUNNING|None\\n", stage="cache", pieces=["a", "b", "c"])
    job = folder / "jobs/distill-math"
    (job / "pieces").mkdir()
    (job / "pieces/a.json").touch()
    (job / "metrics.jsonl").write_text(json.dumps({"time": 1, "step": 40, "total": 50, "seconds": 1.0}))
    (row,) = run_status(folder)
    assert (row.step, row.total, row.eta_s, row.expert) == (1, 3, None, None)


def test_a_failed_job_names_the_rank_and_its_last_error(submitted: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = submitted("7 0 100 1\n")
    crash = "step 1\nTraceback (most recent call last):\n  File x\nRuntimeError: boom\n"
    (folder / "jobs/distill-math/logs/rank-3.log").write_text(crash)
    assert main(["status", "s"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder)
    assert [line.split() for line in lines[1:3]] == [
        ["job", "expert", "id", "state"],
        ["distill-math", "math", "7", "failed", "(exit", "code", "1)"],
    ]
    assert lines[3] == "distill-math: rank 3: RuntimeError: boom"


def test_the_table_leaves_out_columns_that_say_nothing() -> None:
    rows = [JobStatus("fetch", "fetch", None, None, "done"), JobStatus("align", "align", None, None, "running", step=3)]
    assert table(rows).splitlines() == ["job    state    step", "fetch  done", "align  running  3/?"]


def test_several_runs_have_a_line_each(run: Path, submitted: Make, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(queue="7|7|RUNNING|None\\n")
    assert main(["status"]) == 0
    assert capsys.readouterr().out.splitlines() == ["r: 0 of 2 done", "s: 0 of 1 done; running distill-math"]


def test_watching_prints_changes_and_ends_when_nothing_is_alive(
    submitted: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted(queue="7|7|PENDING|Dependency\\n")
    looks = iter(["7|7|PENDING|Dependency\\n", "7|7|RUNNING|None\\n", "7|7|CANCELLED|None\\n"])
    clock = SimpleNamespace(sleep=lambda seconds: monkeypatch.setenv("QUEUE", next(looks)))
    monkeypatch.setattr("launcher.monitor.time", clock)
    (row,) = watch([folder])
    assert row.state == "cancelled"
    assert capsys.readouterr().out.splitlines() == [
        "distill-math: waiting (Dependency)",
        "distill-math: running",
        "distill-math: cancelled",
    ]
    assert EVERY >= 2
    assert main(["status", "s", "--watch", "--json"]) == 2


def test_plain_lines_say_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as lines:
        lines.begin("align")
        lines.update({"step": 1, "total": 2})
        lines.said = -100.0
        lines.update({"step": 1, "total": 2})
        lines.end("done")
    assert capsys.readouterr().out.splitlines() == ["align: started", "align: 1/2", "align: done after 0 s"]
