"""Goodput: each kept step once, over the wall clock of all processes of a job."""

import json
import os
import subprocess
import sys
import time

import pytest

from xlstm_distill.contract import ledger
from xlstm_distill.contract.files import append_line, read_lines
from xlstm_distill.contract.state import set_aside
from xlstm_distill.runtime.metrics import Metrics


def write(folder, *lines):
    for line in lines:
        append_line(folder / "ledger.jsonl", line)


def start(at, step=0):
    return {"event": "start", "time": at, "step": step}


def steps(folder, *records):
    """(step, time, seconds) each."""
    for step, at, seconds in records:
        append_line(folder / "metrics.jsonl", {"time": at, "step": step, "seconds": seconds})


def test_goodput_is_the_seconds_of_the_steps_over_the_wall_clock_from_the_first_start(tmp_path):
    write(tmp_path, start(1000.0))
    steps(tmp_path, (1, 1011.0, 1.0), (2, 1013.0, 2.0), (3, 1020.0, 3.0))
    assert ledger.goodput(tmp_path) == 6 / 20
    assert (ledger.restarts(tmp_path), ledger.wall_seconds(tmp_path, now=1060.0)) == (0, 60.0)


def test_steps_that_a_kill_cost_count_in_the_wall_clock_alone(tmp_path):
    """Killed after step 3 with a checkpoint at step 2: its second is lost, and so is the time until step 3 again."""
    write(tmp_path, start(0.0))
    with Metrics(tmp_path, 4, resume_at=-1) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"seconds": 1.0})
    write(tmp_path, start(50.0, step=2))
    with Metrics(tmp_path, 4, resume_at=2) as metrics:
        for step in (3, 4):
            metrics.log(step, {"seconds": 1.0})
    assert ledger.productive_seconds(tmp_path) == 4.0
    assert ledger.restarts(tmp_path) == 1
    assert ledger.goodput(tmp_path) == pytest.approx(4.0 / time.time(), rel=1e-3)


def test_between_its_end_and_a_larger_budget_a_job_loses_no_time(tmp_path):
    write(tmp_path, start(0.0), {"event": "end", "time": 10.0, "step": 2}, start(1000.0, step=2))
    steps(tmp_path, (1, 5.0, 4.0), (2, 9.0, 4.0), (3, 1010.0, 6.0))
    assert ledger.wall_seconds(tmp_path) == 20.0
    assert ledger.goodput(tmp_path) == 14 / 20


def test_records_without_seconds_and_torn_lines_do_no_harm(tmp_path):
    write(tmp_path, start(0.0))
    steps(tmp_path, (1, 10.0, 5.0))
    append_line(tmp_path / "metrics.jsonl", {"time": 20.0, "step": 1, "validation/error": 0.5})
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "start", "ti')
    assert ledger.goodput(tmp_path) == 5 / 20
    write(tmp_path, start(15.0, step=1))
    assert [line["time"] for line in ledger.starts(tmp_path)] == [0.0, 15.0]
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3


def test_a_job_that_was_never_started_has_no_goodput(tmp_path):
    assert (ledger.goodput(tmp_path), ledger.restarts(tmp_path), ledger.starts(tmp_path)) == (0.0, 0, [])


def test_a_start_counts_from_the_birth_of_its_process(tmp_path):
    script = (
        "import sys, time; time.sleep(0.4); from pathlib import Path;"
        "from xlstm_distill.contract import ledger; ledger.record_start(Path(sys.argv[1]), 7, ranks=2)"
    )
    began = time.time()
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=os.environ)
    (line,) = read_lines(tmp_path / "ledger.jsonl")
    assert line | {"time": 0} == {"event": "start", "time": 0, "step": 7, "ranks": 2}
    assert line["time"] == pytest.approx(began, abs=0.3)


def test_a_job_that_is_set_aside_takes_its_ledger_with_it(tmp_path):
    write(tmp_path, start(0.0))
    ledger.record_end(tmp_path, 3)
    aside = set_aside(tmp_path)
    assert ledger.starts(tmp_path) == []
    assert [json.loads(line)["event"] for line in (aside / "ledger.jsonl").read_text().splitlines()] == ["start", "end"]


def test_the_ledger_needs_no_torch():
    script = (
        "import sys, xlstm_distill.contract.ledger, xlstm_distill.contract.flops; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_line_holds_whatever_separators_a_text_has(tmp_path):
    values = [{"text": "a\u2028b\u2029c\u0085d\x1ee"}, {"text": "f"}]
    for value in values:
        append_line(tmp_path / "lines.jsonl", value)
    assert read_lines(tmp_path / "lines.jsonl") == values
