"""`xdl logs` shows rank 0 and who is in trouble; a failed job's rank and last error line come from the logs."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from launcher import logs
from launcher.cli import main
from launcher.logs import Failure, chosen_job, failure_of, last_error, logs_of
from xlstm_distill.contract.exitcode import Mistake

CRASH = "Traceback (most recent call last):\n  File 'x.py', line 3\n    f()\n"
CHAINED = f"{CRASH}KeyError: 'a'\n\nThe above exception was the direct cause of the following exception:\n\n{CRASH}"
STUCK = "rank 3 (host n, pid 4) is stuck at step 7, forward, for 9.0 s: it is behind the others"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/r"
    (run / "jobs/align/logs").mkdir(parents=True)
    jobs = {name: {"stage": name, "pieces": []} for name in ("fetch", "align")}
    (run / "graph.json").write_text(json.dumps({"jobs": jobs, "edges": []}))
    return run / "jobs/align"


def write(job: Path, name: str, text: str, age: float = 0) -> Path:
    path = job / "logs" / name
    path.write_text(text)
    os.utime(path, (10**9 - age,) * 2)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step 1\nan error: no\n", ""),
        ("error: no room\nbye\n", "no room"),
        (f"{CRASH}ValueError: bad\nbye\n", "ValueError: bad"),
        (f"{CHAINED}RuntimeError: b\n", "RuntimeError: b"),
        ("".join(f"[rank3]: {line}\n" for line in [*CRASH.splitlines(), "MemoryError: x"]), "MemoryError: x"),
        (CRASH, "Traceback (most recent call last)"),
        (f"{STUCK}. Its Python stack 1.0 s ago, the innermost call last:\n  File x\n", STUCK),
    ],
)
def test_the_last_error_is_what_a_mistake_a_traceback_or_the_watchdog_says(text: str, said: str) -> None:
    assert last_error(text) == said


def test_the_task_that_srun_lost_first_failed_the_job(job: Path) -> None:
    write(job, "rank-0.log", f"{CRASH}DistBackendError: connection closed by peer\n", age=9)
    write(job, "rank-2.log", f"{CRASH}ValueError: first\n")
    first = "srun: error: n0: task 1: Killed\nsrun: error: n0: tasks 0,2-3: Exited with exit code 1\n"
    write(job, "slurm-7.log", first + "srun: error: n1: tasks 2-3: Exited with exit code 1\n")
    assert failure_of(job, "7") == Failure(2, "ValueError: first")
    write(job, "slurm-7.log", first)
    assert failure_of(job, "7") == Failure(1, "Killed")
    write(job, "slurm-7.log", first + "error: align: needs fetch\n")
    assert failure_of(job, "7") == Failure(None, "align: needs fetch")
    assert failure_of(job, "8") == Failure(0, "DistBackendError: connection closed by peer")


def test_without_srun_the_log_that_fell_silent_first_counts_and_the_watchdogs_word(job: Path) -> None:
    assert failure_of(job) is None
    write(job, "rank-0.log", f"{CRASH}A: late\n")
    write(job, "rank-5.log", f"{CRASH}B: early\n", age=5)
    write(job, "rank-6.log", "fine\n", age=9)
    assert failure_of(job) == Failure(5, "B: early")
    write(job, "rank-5.log", "rank 3 (host n) is stuck at step 7: it is behind the others\n", age=5)
    assert failure_of(job) == Failure(3, "rank 3 (host n) is stuck at step 7: it is behind the others")


def test_logs_are_rank_0s_those_in_trouble_and_the_batch_scripts_where_it_alone_knows(job: Path) -> None:
    batch = write(job, "slurm-7.log", "srun: error: n0: task 3: Exited with exit code 1\n")
    assert logs_of(job) == [batch]
    zero, three = write(job, "rank-0.log", "fine\n"), write(job, "rank-3.log", f"{CRASH}E: x\n")
    other = write(job, "rank-1.log", "fine\n")
    assert logs_of(job) == [zero, three]
    assert logs_of(job, 1) == [other]
    assert logs_of(job, 9) == []
    batch.write_text("error: align: needs fetch\n")
    assert logs_of(job) == [batch, zero, three]


def test_elements_of_an_array_have_logs_of_their_own(job: Path) -> None:
    logs = [write(job, f"rank-0.element-{element}.log", "fine\n") for element in (0, 2, 10)]
    assert logs_of(job) == logs
    assert logs_of(job, 0) == logs
    write(job, "rank-0.element-2.log", "error: no room\n")
    assert failure_of(job) == Failure(0, "no room")


def test_one_log_is_printed_as_it_is_several_under_their_names(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero = write(job, "rank-0.log", "first\nlast\n")
    assert main(["logs", "r"]) == 0
    assert capsys.readouterr() == ("first\nlast\n", f"==> {zero} <==\n")
    three = write(job, "rank-3.log", f"{CRASH}E: x\n")
    assert main(["logs", "r", "align"]) == 0
    assert capsys.readouterr().out == f"==> {zero} <==\nfirst\nlast\n==> {three} <==\n{CRASH}E: x\n"
    assert main(["logs", "r", "align", "--rank", "3"]) == 0
    assert capsys.readouterr().out == f"{CRASH}E: x\n"


def test_a_followed_log_is_printed_as_it_grows(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(job, "rank-0.log", "a\n")
    added = iter(["b\n", "c\n"])

    def grow(seconds: float) -> None:
        with path.open("a") as file:
            file.write(next(added, "") or (_ for _ in ()).throw(KeyboardInterrupt))

    monkeypatch.setattr("launcher.logs.time.sleep", grow)
    assert main(["logs", "r", "-f"]) == 130
    assert capsys.readouterr().out == "a\nb\nc\n"


def test_what_is_not_there_is_one_line(job: Path) -> None:
    with pytest.raises(Mistake, match="no log yet"):
        chosen_job(job.parents[1], "")
    with pytest.raises(Mistake, match="it has fetch, align"):
        chosen_job(job.parents[1], "alien")
    assert main(["logs", "r", "align", "--rank", "3"]) == 2


def test_a_log_that_comes_later_is_followed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.0)
    first, second = tmp_path / "rank-0.log", tmp_path / "rank-1.log"
    first.write_text("one\n")
    found = [first]
    with ExitStack() as opened:
        texts = logs._texts(lambda: found, opened, follow=True)
        assert next(texts) == "one\n"
        second.write_text("Traceback\n")
        found.append(second)
        assert next(texts) == f"==> {second} <==\nTraceback\n"
