"""A stop is asked for by a signal or by a file, and a loop learns it when it asks."""

import os
import signal

import pytest

from xlstm_distill.contract.exitcode import Stopped
from xlstm_distill.runtime.stop import StopFlag


@pytest.fixture
def flag(tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield StopFlag(tmp_path / "stop")
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nobody_asked(flag):
    assert not flag.requested()
    flag.check()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_asks(flag, number):
    os.kill(os.getpid(), number)
    assert flag.requested()
    with pytest.raises(Stopped, match="launch again to go on"):
        flag.check()


def test_a_file_asks_as_long_as_it_stands(flag):
    flag.stop_file.touch()
    assert flag.requested()
    flag.stop_file.unlink()
    assert not flag.requested()
