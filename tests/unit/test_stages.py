"""A stage as one of several ranks: how a job is finished, and who waits for whom."""

import threading
import time
from pathlib import Path

import pytest

from xlstm_distill import stages
from xlstm_distill.contract.exitcode import DONE, MISTAKE
from xlstm_distill.contract.job import UNFINISHED, Job, JobFolder
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.state import prepare


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> JobFolder:
    """A job whose stage makes nothing."""
    for name in ("StopFlag", "flight_recorder", "die_with_parent"):  # they are about processes, ranks are threads here
        monkeypatch.setattr(stages, name, lambda *given: None)
    monkeypatch.setitem(stages.STAGES, "report", f"{__name__}:nothing")
    made = JobFolder(tmp_path / "jobs/report", Job("report", "report", {}), config)
    made.write()
    made.logs.mkdir()
    return made


@pytest.fixture
def config() -> Config:
    from launcher.compose import compose

    return compose([], {}).config


at_work = threading.Event()


def nothing(folder: JobFolder, world: object, stop: object) -> dict[str, int]:
    at_work.set()
    return {"made": 0}


def rank(folder: JobFolder, number: int, monkeypatch: pytest.MonkeyPatch) -> "Rank":
    """A rank that has read its number from the environment."""
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", "2")
    at_work.clear()
    started = Rank(folder)
    assert at_work.wait(30)
    return started


class Rank(threading.Thread):
    """A rank of the job, in a thread; `code`: how it ended."""

    def __init__(self, folder: JobFolder) -> None:
        super().__init__(daemon=True)
        self.folder, self.code = folder, -1
        self.start()

    def run(self) -> None:
        self.code = stages.main([str(self.folder.path)])


def test_a_rank_leaves_when_rank_0_has_written_the_manifest(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    other = rank(folder, 1, monkeypatch)
    time.sleep(0.3)
    assert other.is_alive()
    monkeypatch.setenv("RANK", "0")
    assert stages.main([str(folder.path)]) == DONE
    other.join(5)
    assert other.code == DONE


def test_a_rank_does_not_wait_for_a_manifest_that_rank_0_cannot_write(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "manifest.json")

    monkeypatch.setattr(JobFolder, "finish", full)
    other = rank(folder, 1, monkeypatch)
    monkeypatch.setenv("RANK", "0")
    assert stages.main([str(folder.path)]) == MISTAKE
    assert "manifest.json: No space left on device; make room" in capsys.readouterr().err
    other.join(5)
    assert other.code == DONE
    assert (folder.path / UNFINISHED).exists()
    prepare(folder.path, folder.job)
    assert not (folder.path / UNFINISHED).exists()


def test_a_full_disk_before_the_ranks_start_is_a_mistake_and_not_a_crash(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from xlstm_distill.__main__ import main
    from xlstm_distill.contract import state

    def full(path: Path, value: object) -> None:
        raise OSError(122, "Disk quota exceeded", str(path))

    monkeypatch.setattr(state, "write_json", full)
    assert main(["prepare", str(folder.path)]) == MISTAKE
    assert "inputs.json: Disk quota exceeded; make room" in capsys.readouterr().err
