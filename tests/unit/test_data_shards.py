"""Shards say what they are."""

import importlib
import sys

import pytest
from data_support import make_shards

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.data.shards import count_samples, import_streaming, sequence_of


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
