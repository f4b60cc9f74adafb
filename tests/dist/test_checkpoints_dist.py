"""Checkpoints of several ranks: written while the steps go on, read by any number of ranks, failing together."""

import json
from pathlib import Path

import pytest
from checkpoint_worker import REPLICATED
from ranks import Ranks

pytestmark = pytest.mark.dist
WORKER = str(Path(__file__).with_name("checkpoint_worker.py"))


def ranks(world: int, folder: Path, *tasks: str) -> None:
    Ranks([WORKER, str(folder), *tasks], world, folder / "logs").wait(seconds=120)


def said(folder: Path, world: int) -> list:
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Three checkpoints of two ranks, written during further steps, and what they should hold."""
    folder = tmp_path_factory.mktemp("saved")
    ranks(2, folder, "save", "load")
    return folder


def test_two_ranks_save_while_their_steps_go_on_and_write_replicated_tensors_once(saved):
    step = saved / "checkpoints" / "step-3"
    assert (saved / "checkpoints" / "latest").read_text() == "step-3"
    assert {file.name for file in step.iterdir()} == {
        "__0_0.distcp", "__1_0.distcp", ".metadata", "state.json", "hashes.json"
    }  # fmt: skip
    assert json.loads((step / "hashes.json").read_text()).keys() == {f.name for f in step.iterdir()} - {"hashes.json"}
    size = sum(file.stat().st_size for file in step.iterdir())
    assert 4 * REPLICATED < size < 6 * REPLICATED


@pytest.mark.parametrize("world", [1, 3])
def test_any_number_of_ranks_reads_them(saved, world):
    ranks(world, saved, "load")


def test_when_one_rank_cannot_write_all_say_so_and_none_hangs(tmp_path):
    ranks(2, tmp_path, "save", "fail")
    first, second = said(tmp_path, 2)
    assert first == second
    failed = f"{tmp_path}/checkpoints/step-9: the checkpoint could not be written (%s); the earlier ones are intact"
    assert first == [failed % cause for cause in ("File too large", "Input/output error", "Input/output error")]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest", "step-1", "step-10", "step-2", "step-3"
    ]  # fmt: skip


def test_a_file_that_one_rank_finds_damaged_stops_all(saved):
    ranks(2, saved, "damaged", "load")
    first, second = said(saved, 2)
    assert first == second
    files = {file.name: file for file in (saved / "checkpoints" / "step-3").iterdir()}
    assert first.keys() == files.keys() - {"hashes.json"}  # that one lost the newline at its end
    for name, line in first.items():
        assert line.startswith(f"{files[name]}: missing or damaged; step-2 is whole")
