"""A stop is asked for by a signal, a file or the end of the time limit, and a loop learns it when it asks."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.runtime import stop
from xlstm_distill.runtime.stop import StopFlag, number_device

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.fixture
def flag(tmp_path, monkeypatch):
    monkeypatch.delenv("XDL_DEADLINE", raising=False)
    return StopFlag(tmp_path / "stop")


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(stop, "time", made := Clock())
    return made


def test_nobody_asked(flag):
    assert not flag.requested()
    flag.check()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_asks(flag, number):
    os.kill(os.getpid(), number)
    assert flag.requested()
    with pytest.raises(Stopped, match="launch again to go on"):
        flag.check()


def test_what_a_loop_found_asks_that_once(flag):
    assert flag.requested(also=True)
    assert not flag.requested()


def test_a_file_asks_within_a_second_as_long_as_it_stands(flag, clock):
    assert not flag.requested()
    flag.stop_file.touch()
    clock.now += 1
    assert flag.requested()
    flag.stop_file.unlink()
    clock.now += 1
    assert not flag.requested()


def test_the_file_is_looked_for_once_in_a_second_however_short_the_steps(flag, clock, monkeypatch):
    looks = []
    monkeypatch.setattr(Path, "exists", lambda path: looks.append(path) or False)
    for _ in range(1000):
        clock.now += 0.0101
        flag.requested()
    assert len(looks) in (10, 11)
    assert set(looks) == {flag.stop_file}


@pytest.mark.parametrize(("left", "expected"), [(61, False), (59, True), (-5, True)])
def test_the_end_of_the_time_limit_asks_a_minute_before(tmp_path, clock, monkeypatch, left, expected):
    monkeypatch.setenv("XDL_DEADLINE", str(1000 + left))
    assert StopFlag(tmp_path / "stop").requested() is expected


def test_it_asks_earlier_where_a_step_and_a_save_take_longer(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("XDL_DEADLINE", "2000")
    flag = StopFlag(tmp_path / "stop")
    flag.expect(600)
    clock.now = 1369
    assert not flag.requested()
    clock.now = 1371
    assert flag.requested()


@pytest.mark.parametrize("none", ["", "0"])
def test_no_time_limit(tmp_path, monkeypatch, none):
    monkeypatch.setenv("XDL_DEADLINE", none)
    assert not StopFlag(tmp_path / "stop").requested()


def test_a_time_limit_that_is_no_number_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDL_DEADLINE", "tomorrow")
    with pytest.raises(Mistake, match="XDL_DEADLINE=tomorrow: expected unix seconds"):
        StopFlag(tmp_path / "stop")


@pytest.mark.parametrize(
    ("backend", "device"), [("gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda"), ("nccl", "cuda")]
)
def test_the_flag_waits_for_no_gpu_where_the_cpu_has_a_backend(monkeypatch, backend, device):
    monkeypatch.setattr(dist, "get_backend_config", lambda: str(BackendConfig(dist.Backend(backend))))
    assert number_device() == torch.device(device)


def test_asking_costs_microseconds(flag):
    flag.requested()
    began = time.thread_time()
    for _ in range(1000):
        flag.requested()
    assert (time.thread_time() - began) / 1000 < 1e-3
