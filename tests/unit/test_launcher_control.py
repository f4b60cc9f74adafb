"""`xdl cancel`, `xdl stop` and `xdl tensorboard` act on what is queued or runs, and say what happens next."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.monitor import run_status

STUB = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0")" in
    squeue) printf '%b' "$QUEUE" ;;
    scancel) [ -z "$REFUSE" ] || { echo "$REFUSE" >&2; exit 1; } ;;
esac
"""
QUEUE = "5|5|RUNNING|None\\n6_0|6|RUNNING|None\\n6_[1-2%1]|6|PENDING|JobArrayTaskLimit\\n7|7|PENDING|Dependency\\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stubs, run = tmp_path / "stubs", tmp_path / "runs/r"
    stubs.mkdir()
    for name in ("squeue", "scancel"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("QUEUE", QUEUE)
    monkeypatch.chdir(tmp_path)
    jobs = {"fetch": None, "align": "5", "distill-math": "6", "merge": "7", "eval": "8"}
    for name in jobs:
        (run / "jobs" / name).mkdir(parents=True)
    described = {name: {"stage": name, "pieces": [], **({"id": id} if id else {})} for name, id in jobs.items()}
    (run / "graph.json").write_text(json.dumps({"jobs": described, "edges": []}))
    (run / "launches.jsonl").write_text('{"command": "xdl launch --name x"}\n{"command": "xdl launch --name r"}\n')
    return run


def scancels(run: Path) -> list[str]:
    return [line for line in (run.parents[1] / "calls").read_text().splitlines() if line.startswith("scancel")]


def test_cancel_takes_all_that_is_queued_or_runs_in_one_call(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", "r"]) == 0
    assert scancels(run) == ["scancel 5 6 7"]
    assert capsys.readouterr().out.splitlines() == [
        "align: cancelled (5, was running)",
        "distill-math: cancelled (6, was running)",
        "merge: cancelled (7, was waiting)",
        "go on with: xdl launch --name r",
    ]


def test_a_cancelled_job_is_known_as_such_when_slurm_has_forgotten_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["cancel", "r", "align"]) == 0
    assert scancels(run) == ["scancel 5"]
    monkeypatch.setenv("QUEUE", "")
    assert {row.name: row.state for row in run_status(run)}["align"] == "cancelled"


def test_stop_asks_what_runs_for_a_checkpoint_and_cancels_what_waits(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", "r"]) == 0
    assert scancels(run) == ["scancel --state=PENDING 5 6 7"]
    assert [name for name in ("fetch", "align", "distill-math", "eval") if (run / "jobs" / name / "stop").exists()] == [
        "align", "distill-math",
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "align: will write a checkpoint after its step and end",
        "distill-math: will write a checkpoint after its step and end",
        "merge: cancelled (7, was waiting); it had not begun or waited to go on",
        "go on with: xdl launch --name r",
    ]


def test_nothing_to_do_unknown_jobs_and_refusals_are_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cancel", "r", "aling"]) == 2
    assert "aling: no such job in r; it has fetch, align" in capsys.readouterr().err
    monkeypatch.setenv("REFUSE", "scancel: error: Access denied")
    assert main(["cancel", "r"]) == 2
    assert "scancel refuses: scancel: error: Access denied" in capsys.readouterr().err
    monkeypatch.setenv("QUEUE", "")
    for command in ("cancel", "stop"):
        assert main([command, "r"]) == 0
        assert capsys.readouterr().out == "r: nothing is queued or running\n"
    assert not scancels(run)[1:]


LAUNCH = """
import sys, time
from pathlib import Path
from launcher.runs import locked
with locked(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "jobs/fetch/config.yaml").touch()
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_launch_on_this_machine_is_told_to_end_and_its_job_to_stop(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(Path(__file__).parents[2])
    command, environment = [sys.executable, "-c", LAUNCH, str(run)], {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as launch:
        try:
            assert launch.stdout
            launch.stdout.readline()
            assert main(["stop", "r", "fetch"]) == 0
            assert (run / "jobs/fetch/stop").exists()
            assert "fetch: will write a checkpoint" in capsys.readouterr().out
            assert main(["cancel", "r", "fetch"]) == 0
            assert f"its launch (process {launch.pid}) is told to end" in capsys.readouterr().out
            assert launch.wait(10) == -signal.SIGTERM
            assert not (run.parents[1] / "calls").exists() or not scancels(run)
        finally:
            launch.kill()


def test_a_launch_on_another_machine_cannot_be_ended_from_here(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launcher.monitor.held", lambda lock: (1, "elsewhere"))
    monkeypatch.setattr("launcher.control.held", lambda lock: (1, "elsewhere"))
    (run / "jobs/fetch/config.yaml").touch()
    assert main(["cancel", "r", "fetch"]) == 2
    assert "it was launched on elsewhere; cancel it there" in capsys.readouterr().err


def test_tensorboard_gets_the_runs_folder_and_what_else_is_given(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[list[str]] = []
    answer = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr("launcher.control.subprocess.run", lambda command, **_: begun.append(command) or answer)
    assert main(["tensorboard", "r", "--port", "7007", "--host=0.0.0.0"]) == 3
    line = ["-m", "tensorboard.main", "--logdir", str(run / "jobs"), "--port", "7007", "--host=0.0.0.0"]
    assert begun == [[sys.executable, *line]]
    monkeypatch.setattr("launcher.control.find_spec", lambda name: None)
    assert main(["tensorboard", "r"]) == 2
    assert "tensorboard is not installed here" in capsys.readouterr().err
