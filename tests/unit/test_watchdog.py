"""Whom the others are waiting for, told from what each rank left in its heartbeat."""

import faulthandler
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from xlstm_distill.contract.job import World
from xlstm_distill.runtime import heartbeat, watchdog
from xlstm_distill.runtime.heartbeat import BEHIND, BUSY, SILENT, UNKNOWN, Heartbeat, culprits
from xlstm_distill.runtime.watchdog import Watchdog

WAITING = [
    '  File "loop.py", line 3, in train', "    loss.backward()",
    '  File "/x/torch/distributed/distributed_c10d.py", line 9, in all_reduce', "    work.wait()",
]  # fmt: skip
ON_GPU = ['  File "/x/xlstm_distill/train/align.py", line 3, in gradients', "    return values.tolist()"]
READING = ['  File "/x/xlstm_distill/data/reader.py", line 3, in read', "    return file.read(size)"]


def beat(rank: int, stack: list[str] = WAITING, *, age: float = 0.5, beats: int = 10) -> Heartbeat:
    return Heartbeat(rank, "node7", 1, 0, 1000 - age, beats, 5, "step", 990.0, stack)


def judge(*beats: Heartbeat, ranks: int = 4):
    return culprits({b.rank: b for b in beats}, ranks, 1000.0, silent_seconds=5.0)


def test_a_rank_whose_process_stands_still_is_named_before_all_others():
    assert judge(beat(0), beat(1, age=9), beat(2, READING), beat(3, beats=9)) == ([1], SILENT)


def test_a_rank_that_left_nothing_counts_as_silent():
    assert judge(beat(0), beat(2), beat(3)) == ([1], SILENT)


def test_then_ranks_that_wait_for_nobody():
    assert judge(beat(0, ON_GPU), beat(1, READING, beats=12), beat(2), beat(3, beats=9)) == ([1], BUSY)


def test_then_ranks_that_are_behind():
    assert judge(beat(0), beat(1, beats=9), beat(2, ON_GPU), beat(3, beats=9)) == ([1, 3], BEHIND)


def test_else_all():
    assert judge(beat(0), beat(1), ranks=2) == ([0, 1], UNKNOWN)


def test_a_call_further_out_says_nothing_about_the_innermost():
    assert heartbeat.waits(WAITING)
    assert not heartbeat.waits([*WAITING, *READING])
    assert not heartbeat.waits([])


def test_a_report_names_rank_host_pid_step_phase_time_and_stack(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    lines = watchdog.report(3, replace(beat(3, READING), pid=77), BUSY).splitlines()
    assert lines[0].startswith("rank 3 (host node7, pid 77) is stuck at step 5, step, for 10.0 s: it waits for no")
    assert lines[1:] == READING
    assert watchdog.report(3, None, SILENT) == f"rank 3 is stuck: {SILENT}; it left no heartbeat\n"


def test_what_is_written_is_read_again_and_what_is_broken_is_not(tmp_path):
    heartbeat.write(tmp_path, beat(0))
    heartbeat.path_of(tmp_path, 1).write_text("{")
    heartbeat.path_of(tmp_path, 2).write_text('{"rank": 2}')
    assert heartbeat.read(tmp_path, 4) == {0: beat(0)}


def test_a_start_removes_what_a_start_with_more_ranks_left(tmp_path):
    for rank in (0, 1, 7):
        heartbeat.write(tmp_path, beat(rank))
    heartbeat.clear(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.json", "rank-1.json"]


def test_a_heartbeat_holds_the_stack_of_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(heartbeat.take(1, 2, 3, "data", 4.0)))
    thread.start()
    thread.join()  # the innermost frame's line may be one of threading's
    (mine,) = found
    assert (mine.rank, mine.beats, mine.step, mine.phase, mine.since) == (1, 2, 3, "data", 4.0)
    assert (mine.host, mine.pid) == (platform.node(), os.getpid())
    assert any("test_a_heartbeat_holds_the_stack_of_the_main_thread" in line for line in mine.stack)


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_only_the_very_process_is_killed(sleeper, monkeypatch):
    monkeypatch.setattr(heartbeat, "ABORT_SECONDS", 0.05)
    started = heartbeat._started(sleeper.pid)
    mine = replace(beat(0), pid=sleeper.pid, started=started, host=platform.node())
    heartbeat.kill([replace(mine, started=started + 1), replace(mine, started=0), replace(mine, host="another")])
    assert sleeper.poll() is None
    sleeper.send_signal(signal.SIGSTOP)
    heartbeat.kill([mine])
    assert sleeper.wait(5) in (-signal.SIGABRT, -signal.SIGKILL)


def test_its_file_stands_while_it_runs_and_no_longer(tmp_path):
    with Watchdog(tmp_path, World(3, 4), 600) as dog:
        dog.beat(7, "data")
        assert heartbeat.path_of(tmp_path / "heartbeats", 3).exists()
    assert not list((tmp_path / "heartbeats").iterdir())
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]


@pytest.mark.parametrize("living", [True, False])
def test_a_wait_for_a_disk_may_last_longer_but_not_for_a_rank_that_does_not_run(tmp_path, monkeypatch, living):
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda dog, silence: ended.append(silence))
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)  # it would end this process
    monkeypatch.setattr(heartbeat, "read", lambda *_: {1: replace(beat(1), time=time.time() - 10 * (not living))})
    with Watchdog(tmp_path, World(0, 2), 0.2) as dog:
        dog.beat(7, "step")
        dog.beat(7, "checkpoint", 1.0 if living else 600)
        deadline = time.monotonic() + 60
        while not ended:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert ended[0] >= (1.0 if living else 0.2)


def test_it_can_be_switched_off(tmp_path):
    with Watchdog(tmp_path, World(), 0) as dog:
        dog.beat(1, "data")
        assert not [t for t in threading.enumerate() if t.name == "watchdog"]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path):
    (tmp_path / "heartbeats").write_text("a file")
    with Watchdog(tmp_path, World(), 600) as dog:
        dog.beat(1, "data")


def test_beats_cost_microseconds(tmp_path):
    with Watchdog(tmp_path, World(), 600) as dog:
        began = time.thread_time()  # other processes do not count
        for step in range(10_000):
            dog.beat(step, "data")
        assert (time.thread_time() - began) / 10_000 < 20e-6


FLIGHT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from xlstm_distill.runtime.watchdog import dump_collectives, flight_recorder
logs = Path(sys.argv[1])
flight_recorder(logs)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3))
dump_collectives(logs, 0)
"""


@pytest.mark.slow
def test_the_flight_recorder_keeps_the_collectives(tmp_path):
    subprocess.run([sys.executable, "-c", FLIGHT, str(tmp_path / "logs")], check=True)
    record = pickle.loads((tmp_path / "logs/collectives-0").read_bytes())
    assert [entry["profiling_name"] for entry in record["entries"]] == ["gloo:all_reduce"]
