"""A checkpoint is whole or absent, `latest` names a whole one, and nothing damaged is read."""

import resource
from contextlib import contextmanager

import pytest
import torch

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.train import checkpoint


def tensors(value, size=6):
    return {"a.weight": torch.full((size, 3), float(value)), "a.bias": torch.arange(4.0) + value}


def save(folder, step, keep=2, size=6):
    checkpoint.save(folder, step, tensors(step, size), {"note": f"of {step}"}, keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(tmp_path):
    save(tmp_path, 7)
    newest = checkpoint.latest(tmp_path)
    assert newest == tmp_path / "step-7"
    assert checkpoint.read_state(newest) == {"step": 7, "note": "of 7"}
    found = tensors(0)
    checkpoint.load(newest, found)
    assert all(found[name].equal(wanted) for name, wanted in tensors(7).items())


def test_without_a_checkpoint_there_is_no_latest(tmp_path):
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    for step in (2, 10, 9, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["latest", "step-10", "step-100"]
    assert (tmp_path / "latest").read_text() == "step-100"


def test_latest_moves_and_older_ones_go_only_after_the_new_one_is_durable(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    seen = []

    def killed(path, text):
        assert checkpoint.read_state(tmp_path / "step-2")["step"] == 2
        seen.append((path.name, text, names(tmp_path)))
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep=1)
    assert seen == [("latest", "step-2", ["latest", "step-1", "step-2"])]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    monkeypatch.undo()
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["latest", "step-2"]


def test_what_a_killed_process_left_half_written_is_ignored_and_replaced(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-2.tmp").mkdir()
    (tmp_path / ".step-2.tmp" / "__0_0.distcp").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-1", "step-2"]
    assert checkpoint.read_state(tmp_path / "step-2")["step"] == 2


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_damaged_file_is_named_before_anything_is_read(tmp_path, name, how):
    save(tmp_path, 3)
    file = tmp_path / "step-3" / name
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Mistake, match=rf"step-3/{name}: missing or damaged; put an older step-N into .*latest"):
        checkpoint.read_state(tmp_path / "step-3")


def test_a_folder_without_hashes_is_not_a_checkpoint(tmp_path):
    (tmp_path / "step-1").mkdir()
    with pytest.raises(Mistake, match="step-1: not a whole checkpoint"):
        checkpoint.read_state(tmp_path / "step-1")


@contextmanager
def files_of_at_most(size):
    """As on a full disk, writes fail half way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_is_one_line_and_the_earlier_checkpoint_is_intact(tmp_path):
    save(tmp_path, 1)
    with (
        files_of_at_most(1 << 14),
        pytest.raises(Mistake, match=r"step-2: the checkpoint could not be written .*intact"),
    ):
        save(tmp_path, 2, size=100_000)
    assert names(tmp_path) == ["latest", "step-1"]
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["step"] == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(Mistake, match="step-1: the checkpoint could not be written"):
        save(tmp_path / "checkpoints", 1)
