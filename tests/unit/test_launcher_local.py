"""The local backend: jobs in graph order in the foreground, stopped by Ctrl-C, resumed by the same command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.backends import local
from launcher.cli import main
from launcher.monitor import run_status
from launcher.runs import locked, read_graph
from xlstm_distill.contract.exitcode import Mistake

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_stage.py")
JOBS = ["fetch", "tokenize", "cache", "align", "distill-math", "distill-code", "merge", "eval", "report"]


@pytest.fixture(autouse=True)
def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "command_of", lambda folder: [sys.executable, str(FAKE), str(folder.path)])


def steps(run: Path, job: str) -> list[str]:
    return (run / "jobs" / job / "steps").read_text().split()


@pytest.mark.slow
def test_a_launch_runs_every_job_once_in_order_and_prints_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--name", "r", "cluster=local"]) == 0
    run = tmp_path / "runs/r"
    text = capsys.readouterr().out
    started = [line.removesuffix(": started") for line in text.splitlines() if line.endswith(": started")]
    assert started == JOBS
    assert text.rstrip().endswith("the table of the report")
    assert all((run / "jobs" / job / "manifest.json").exists() for job in JOBS)
    assert list(read_graph(run)["jobs"]) == JOBS
    assert ["fetch", "tokenize"] in read_graph(run)["edges"]
    assert (run / "config.yaml").exists()
    assert "offline=0" in (run / "jobs/fetch/logs/rank-0.log").read_text()
    assert "offline=1" in (run / "jobs/align/logs/rank-0.log").read_text()
    assert {row.state for row in run_status(run)} == {"done"}

    assert main(["launch", "--name", "r", "cluster=local"]) == 0
    again = capsys.readouterr().out
    assert "all 9 jobs are done" in again
    assert "started" not in again
    assert again.rstrip().endswith("the table of the report")
    assert steps(run, "align") == list("12345")


@pytest.mark.slow
def test_a_failing_job_ends_the_launch_with_its_code_and_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "tokenize:7")
    assert main(["launch", "--name", "r", "cluster=local"]) == 7
    text = capsys.readouterr().out
    assert "Traceback: the fake crash" in text
    assert f"its log: {tmp_path}/runs/r/jobs/tokenize/logs/rank-0.log" in text
    monkeypatch.setenv("FAKE_FAIL", "tokenize:2")
    assert main(["launch", "--name", "r", "cluster=local"]) == 2
    text = capsys.readouterr().out
    assert "error: the fake mistake" in text
    assert "Traceback" not in text
    monkeypatch.delenv("FAKE_FAIL")
    assert main(["launch", "--name", "r", "stage=align", "cluster=local"]) == 0
    assert steps(tmp_path / "runs/r", "fetch") == list("12345")


def test_other_settings_in_the_same_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--name", "r", "stage=align", "cluster=local", "student.window=64"]) == 0
    capsys.readouterr()
    assert main(["launch", "--name", "r", "stage=align", "cluster=local", "student.window=32"]) == 2
    told = capsys.readouterr().err
    assert "align:\n  - student.window: 64\n  + student.window: 32\n" in told
    assert "error: align: student.window is 64 in this run and 32 now" in told
    assert "--restart align" in told


@pytest.mark.slow
def test_a_restart_sets_aside_what_was_made_and_makes_it_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["launch", "--name", "r", "stage=align", "cluster=local"]
    assert main([*command, "student.window=64"]) == 0
    before = (tmp_path / "runs/r/jobs/align/output/result.txt").read_text()
    assert main([command[0], "--restart", "align", *command[1:], "student.window=32"]) == 0
    assert (tmp_path / "runs/r/jobs/align/stale-1/output/result.txt").read_text() == before
    assert "'student.window': 32" in (tmp_path / "runs/r/jobs/align/output/result.txt").read_text()
    assert steps(tmp_path / "runs/r", "align") == list("1234512345")
    assert steps(tmp_path / "runs/r", "fetch") == list("12345")
    capsys.readouterr()
    assert main([command[0], "--restart", "alien", *command[1:]]) == 2
    assert "--restart alien: no such job here; there are fetch, tokenize, align" in capsys.readouterr().err


def test_only_runs_the_stage_alone_and_names_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--name", "r", "--only", "stage=align", "cluster=local"]) == 2
    assert "align: needs fetch" in capsys.readouterr().err


@pytest.mark.slow
def test_a_longer_budget_extends_the_job_and_redoes_what_follows(tmp_path: Path) -> None:
    command = ["launch", "--name", "r", "stage=distill", "experts=[math]", "cluster=local"]
    assert main(command) == 0
    assert main([*command, "align.tokens=8192000"]) == 0
    run = tmp_path / "runs/r"
    assert steps(run, "tokenize") == list("12345")
    assert (run / "jobs/align/manifest.json").read_text().count('"tokens": 8192000') == 1
    assert (run / "jobs/distill-math/stale-1/manifest.json").exists()
    assert steps(run, "distill-math") == list("1234512345")


def test_a_second_launch_of_the_same_run_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "r"):
        folder = str(tmp_path / "r")
        other = f"from launcher.runs import locked; from pathlib import Path\nwith locked(Path({folder!r})): pass"
        done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, cwd=ROOT, check=False)
        assert f"process {os.getpid()} on" in done.stderr
    (tmp_path / "r/lock").write_text("999999 elsewhere\n")
    with locked(tmp_path / "r"):
        pass
    with locked(tmp_path / "r"), pytest.raises(Mistake, match="is launching this run"), locked(tmp_path / "r"):
        pass


def start_launch(tmp_path: Path, **environment: str) -> "subprocess.Popen[str]":
    code = (
        "import sys; from launcher.backends import local; from launcher.cli import main;"
        f"local.command_of = lambda folder: [sys.executable, {str(FAKE)!r}, str(folder.path)];"
        "sys.exit(main(['launch', '--name', 'r', 'stage=align', 'cluster=local']))"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_waits_for_the_checkpoint_and_the_same_command_goes_on(tmp_path: Path, number: int) -> None:
    run = tmp_path / "runs/r"
    launch = start_launch(tmp_path, FAKE_STEP="1")
    wait_for((run / "jobs/fetch/steps").exists)
    os.killpg(launch.pid, number)
    text = launch.communicate(timeout=120)[0]
    assert launch.returncode == 75
    assert "waiting for the checkpoint" in text
    assert "go on with: xdl" in text
    assert not (run / "jobs/fetch/stop").exists()
    assert start_launch(tmp_path).wait(timeout=120) == 0
    assert steps(run, "fetch") == list("12345")


@pytest.mark.slow
def test_a_launch_that_is_killed_takes_its_job_along_and_the_next_one_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "runs/r"
    launch = start_launch(tmp_path, FAKE_STEP="0.5")
    wait_for((run / "jobs/fetch/steps").exists)
    launch.kill()
    launch.wait()
    (run / "jobs/fetch/stop").touch()  # a stale one must not stop the next launch
    again = start_launch(tmp_path)
    assert again.wait(timeout=120) == 0
    assert steps(run, "fetch") == list("12345")


@pytest.mark.slow
def test_a_second_launch_while_one_runs_is_one_line(tmp_path: Path) -> None:
    first = start_launch(tmp_path, FAKE_STEP="2")
    wait_for((tmp_path / "runs/r/jobs/fetch/steps").exists)
    second = start_launch(tmp_path)
    text = second.communicate(timeout=120)[0]
    assert second.returncode == 2
    assert f"process {first.pid} on" in text
    assert text.count("\n") == 1
    first.terminate()
    assert first.wait(timeout=120) == 75
