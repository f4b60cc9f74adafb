"""Progress, status and logs are read from the run folder."""

import json
import os
import time
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.monitor import job_status, log_of, table
from launcher.progress import Lines, describe, duration, last_record
from xlstm_distill.contract.exitcode import Mistake


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


def test_the_state_follows_from_lock_manifest_and_age(run: Path) -> None:
    align = run / "jobs/align"
    assert job_status(align, "align", waiting=True).state == "running"
    assert job_status(align, "align", waiting=False).state == "stopped"
    assert job_status(run / "jobs/fetch", "fetch", waiting=True).state == "waiting"
    assert job_status(run / "jobs/fetch", "fetch", waiting=False, in_queue=True).state == "queued"
    for file in (align / "metrics.jsonl", align / "logs/rank-0.log"):
        os.utime(file, (time.time() - 7200,) * 2)
    found = job_status(align, "align", waiting=True)
    assert (found.state, found.age) == ("stopped", "2 h")


def test_status_prints_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "r"]) == 0
    text = capsys.readouterr().out
    assert str(run) in text
    assert [line.split()[:3] for line in text.splitlines()[1:]] == [
        ["job", "state", "step"],
        ["fetch", "waiting"],
        ["align", "stopped", "3/9"],
    ]
    assert main(["status"]) == 0
    assert table([job_status(run / "jobs/fetch", "fetch", waiting=False)]) == "fetch  waiting"


def test_logs_prints_the_jobs_that_wrote_last(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "r"]) == 0
    assert capsys.readouterr().out == "first\nlast\n"
    with pytest.raises(Mistake, match="it has fetch, align"):
        log_of(run, "alien", 0)
    with pytest.raises(Mistake, match="no log of rank 3 yet"):
        log_of(run, "align", 3)


def test_plain_lines_say_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as lines:
        lines.begin("align")
        lines.update({"step": 1, "total": 2})
        lines.said = -100.0
        lines.update({"step": 1, "total": 2})
        lines.end("done")
    assert capsys.readouterr().out.splitlines() == ["align: started", "align: 1/2", "align: done after 0 s"]
