"""What several files of unit tests need."""

import shutil
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import settings

from launcher import estimate

settings.register_profile("busy", deadline=None)  # other processes share the cores
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch asks how much disk and memory there is: what a test says must not hang on this machine's."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e15))
    monkeypatch.setattr(estimate, "_host_memory", lambda: 1e15)


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Put back the handlers that a stop flag takes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
