"""A checkpoint is whole or absent, `latest` names a durable one, nothing damaged is read, no step waits for disks."""

import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from train_support import small_disk

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.train import checkpoint
from xlstm_distill.train.checkpoint import Checkpoints


def tensors(value, size=6):
    return {"a.weight": torch.full((size, 3), float(value)), "a.bias": torch.arange(4.0) + value}


def save(folder, step, keep=2, size=6, keep_every=0):
    made = Checkpoints(folder, keep, keep_every)
    made.save(step, tensors(step, size), {"note": f"of {step}"})
    made.wait()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def loaded(path, size=6):
    found = tensors(0, size)
    checkpoint.load(path, found)
    return found


def same(one, two):
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_what_was_saved_is_loaded(tmp_path):
    save(tmp_path, 7)
    newest = checkpoint.latest(tmp_path)
    assert newest == tmp_path / "step-7"
    assert checkpoint.read_state(newest) == {"step": 7, "note": "of 7"}
    assert same(loaded(newest), tensors(7))


def test_without_a_checkpoint_there_is_no_latest(tmp_path):
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_what_changes_after_save_returned_is_not_in_the_checkpoint(tmp_path, monkeypatch):
    changed, original = threading.Event(), Checkpoints._write

    def later(*arguments):
        assert changed.wait(10)
        original(*arguments)

    monkeypatch.setattr(Checkpoints, "_write", later)
    made = Checkpoints(tmp_path, 2)
    for step in (1, 2):  # the second reuses the memory of the first
        changed.clear()
        values, state = tensors(step), {"validations": {"start": step}}
        made.save(step, values, state)
        for tensor in values.values():
            tensor.zero_()
        state["validations"]["start"] = 0
        assert checkpoint.latest(tmp_path) == (None if step == 1 else tmp_path / "step-1")
        changed.set()
        made.wait()
        assert checkpoint.read_state(tmp_path / f"step-{step}")["validations"] == {"start": step}
        assert same(loaded(tmp_path / f"step-{step}"), tensors(step))
    assert made.last_seconds > 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_the_writing_thread_steps_aside_and_nothing_else_changes(tmp_path, monkeypatch):
    seen, original = [], Checkpoints._publish

    def watched(*arguments):
        seen.append((os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        original(*arguments)

    monkeypatch.setattr(Checkpoints, "_publish", watched)
    mine = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), torch.serialization.get_crc32_options()
    save(tmp_path, 1)
    assert seen == [(os.SCHED_BATCH, 19)]
    assert mine == (
        os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), torch.serialization.get_crc32_options()
    )  # fmt: skip


def test_copies_follow_tensors_that_change_their_shape_or_are_gone(tmp_path):
    made = Checkpoints(tmp_path, 2)
    made.save(1, tensors(1, 4), {})
    made.save(2, tensors(2, 9), {})
    made.save(3, {"b": torch.arange(5, dtype=torch.float64)}, {})
    made.wait()
    assert same(loaded(tmp_path / "step-2", 9), tensors(2, 9))
    found = {"b": torch.zeros(5, dtype=torch.float64)}
    checkpoint.load(tmp_path / "step-3", found)
    assert found["b"].equal(torch.arange(5, dtype=torch.float64))


def test_views_and_transposed_tensors_are_saved_as_they_look(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    wanted = {"part": base[1:3, 2:4], "turned": base.T, "scalar": torch.tensor(3.0), "empty": torch.empty(0, 5)}
    made = Checkpoints(tmp_path, 1)
    made.save(1, dict(wanted), {})
    made.wait()
    found = {name: torch.full(tensor.shape, -1.0) for name, tensor in wanted.items()}
    checkpoint.load(tmp_path / "step-1", found)
    assert same(found, wanted)


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    for step in (2, 9, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["latest", "step-10", "step-100"]
    assert (tmp_path / "latest").read_text() == "step-100"


def test_multiples_stay_besides_the_newest(tmp_path):
    for step in (2, 4, 5, 6, 8, 10, 11):
        save(tmp_path, step, keep=2, keep_every=4)
    assert names(tmp_path) == ["latest", "step-10", "step-11", "step-4", "step-8"]


def test_one_who_went_back_keeps_what_latest_names(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    (tmp_path / "latest").write_text("step-2")
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["latest", "step-3", "step-4", "step-6"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-3"
    (tmp_path / "step-4" / "state.json").write_text("of the future that was left")
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["latest", "step-4", "step-6"]
    assert checkpoint.read_state(tmp_path / "step-4")["step"] == 4


def test_a_folder_of_the_users_own_is_left_alone(tmp_path):
    (tmp_path / "step-1.mine").mkdir()
    for step in (2, 3):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["latest", "step-1.mine", "step-3"]


def test_the_step_that_latest_names_is_not_written_again(tmp_path):
    save(tmp_path, 1)
    before = (tmp_path / "step-1" / "hashes.json").stat().st_mtime_ns
    made = Checkpoints(tmp_path, 2)
    made.save(1, tensors(5), {})
    made.wait()
    assert (tmp_path / "step-1" / "hashes.json").stat().st_mtime_ns == before
    assert same(loaded(tmp_path / "step-1"), tensors(1))


def test_latest_moves_and_older_ones_go_only_after_the_new_one_is_durable(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    seen, original = [], checkpoint.write_atomic

    def killed(path, text):
        if path.name == "latest":
            assert checkpoint.read_state(tmp_path / "step-2")["step"] == 2
            seen.append((text, names(tmp_path)))
            raise KeyboardInterrupt
        original(path, text)

    monkeypatch.setattr(checkpoint, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep=1)
    assert seen == [("step-2", ["latest", "step-1", "step-2"])]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    monkeypatch.undo()
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["latest", "step-2"]


def test_what_a_killed_process_left_half_written_is_ignored_and_removed(tmp_path):
    save(tmp_path, 1)
    for left in (".step-2.tmp", ".step-1.old.tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "__0_0.distcp").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-1", "step-3"]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_damaged_file_is_named_before_anything_is_read_and_so_is_a_whole_checkpoint(tmp_path, name, how):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    damage(tmp_path / "step-3" / name, how)
    with pytest.raises(Mistake, match=rf"step-3/{name}: missing or damaged; step-2 is whole: write .* into .*/latest"):
        checkpoint.read_state(tmp_path / "step-3")
    damage(tmp_path / "step-2" / name, how)
    with pytest.raises(Mistake, match=rf"step-3/{name}: missing or damaged; step-1 is whole"):
        checkpoint.read_state(tmp_path / "step-3")
    damage(tmp_path / "step-1" / name, how)
    with pytest.raises(Mistake, match=rf"step-3/{name}: .* no other checkpoint is whole; remove {tmp_path} to begin"):
        checkpoint.read_state(tmp_path / "step-3")


def damage(file, how):
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_damaged_hashes_are_found_too(tmp_path, how):
    save(tmp_path, 3)
    damage(tmp_path / "step-3" / "hashes.json", how)
    with pytest.raises(Mistake, match="step-3"):
        checkpoint.read_state(tmp_path / "step-3")


def test_a_folder_without_hashes_or_no_folder_at_all_is_not_a_checkpoint(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "latest").write_text("step-2")
    for path in (tmp_path / "step-1", checkpoint.latest(tmp_path)):
        with pytest.raises(Mistake, match=f"{path}: not a whole checkpoint"):
            checkpoint.read_state(path)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(Mistake, match=r"step-1: does not fit.*a\.weight"):
        checkpoint.load(tmp_path / "step-1", tensors(0, 7))
    with pytest.raises(Mistake, match=r"step-1: does not fit.*other"):
        checkpoint.load(tmp_path / "step-1", {"other": torch.zeros(2)})


@contextmanager
def files_of_at_most(size):
    """As on a full disk, writes fail half way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_is_one_line_the_earlier_one_is_intact_and_the_next_save_works(tmp_path):
    made = Checkpoints(tmp_path, 2)
    made.save(1, tensors(1), {})
    made.wait()
    assert not made.failed
    line = r"step-2: the checkpoint could not be written \(File too large\); the earlier ones are intact"
    with files_of_at_most(1 << 14):
        made.save(2, tensors(2, 100_000), {})
        made._writer.join()
        assert made.failed
        with pytest.raises(Mistake, match=line):
            made.wait()
        made.save(2, tensors(2, 100_000), {})
        with pytest.raises(Mistake, match=line):
            made.save(3, tensors(3), {})
    assert names(tmp_path) == ["latest", "step-1"]
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["step"] == 1
    made.save(4, tensors(4), {})
    made.wait()
    assert not made.failed
    assert same(loaded(checkpoint.latest(tmp_path)), tensors(4))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(Mistake, match=r"step-1: the checkpoint could not be written \(.*\)"):
        save(tmp_path / "checkpoints", 1)


def test_a_state_that_is_not_json_fails_at_once(tmp_path):
    with pytest.raises(TypeError):
        Checkpoints(tmp_path, 1).save(1, tensors(1), {"thing": object()})
    assert names(tmp_path) == []


def test_a_full_and_a_read_only_disk_are_named(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        save(disk / "checkpoints", 1)
        with pytest.raises(Mistake, match=r"step-2: .*\(No space left on device\); the earlier ones are intact"):
            save(disk / "checkpoints", 2, size=100_000)
        assert names(disk / "checkpoints") == ["latest", "step-1"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(Mistake, match=r"step-2: .*\(Read-only file system\); the earlier ones are intact"):
            save(disk / "checkpoints", 2)
        assert same(loaded(checkpoint.latest(disk / "checkpoints")), tensors(1))
