"""Shards say what they are, and targets of another teacher are refused."""

import importlib
import sys

import pytest
from data_support import make_shards

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.data import codec
from xlstm_distill.data.shards import check_targets, count_samples, import_streaming, sequence_of, write_targets_note

NOTE = {"teacher": "aa", "tokenizer": "bb", "top_k": 32, "codec": codec.VERSION}


def test_streaming_comes_without_torchvision():
    import_streaming()
    assert "torchvision" not in sys.modules


def test_a_missing_streaming_is_one_line_that_says_how_to_get_it(monkeypatch):
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "streaming"}
    for name in kept:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "streaming", None)
    with pytest.raises(Mistake, match="run: xdl doctor --install-streaming"):
        import_streaming()
    assert "streaming.vision" not in sys.modules
    monkeypatch.undo()
    importlib.import_module("streaming")


def test_count_and_length_stand_in_the_index(tmp_path):
    folder = make_shards(tmp_path / "a", 20, sequence=8)
    assert (count_samples(folder), sequence_of(folder)) == (20, 8)
    with pytest.raises(Mistake, match="no token shards there"):
        count_samples(tmp_path)


def test_targets_made_as_expected_are_accepted(tmp_path):
    write_targets_note(tmp_path, NOTE)
    check_targets(tmp_path, {"teacher": "aa", "tokenizer": "bb", "top_k": 32})


@pytest.mark.parametrize(("key", "here"), [("teacher", "cc"), ("tokenizer", "cc"), ("top_k", 64), ("codec", 99)])
def test_targets_made_otherwise_are_refused_with_both_values(tmp_path, key, here):
    write_targets_note(tmp_path, NOTE)
    with pytest.raises(Mistake, match=f"made with {key}={NOTE[key]}, this run has {key}={here}"):
        check_targets(tmp_path, {key: here})


def test_shards_without_targets_are_refused(tmp_path):
    with pytest.raises(Mistake, match=r"holds no teacher targets.*run stage=cache"):
        check_targets(tmp_path, {})
    (tmp_path / "targets.json").write_text("{", encoding="utf-8")
    with pytest.raises(Mistake, match="damaged, not JSON"):
        check_targets(tmp_path, {})
