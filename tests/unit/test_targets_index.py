"""Cached targets say whose they are and how they were made; what is not the run's is refused with both values."""

import json
from dataclasses import replace

import pytest
from data_support import make_config

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Cache, Student
from xlstm_distill.data import codec
from xlstm_distill.teacher.index import chat_template_hash, check_targets, index_of, read_note, write_note


def index(tmp_path, **changes):
    fetched = tmp_path / "fetched"
    (fetched / "teacher").mkdir(parents=True, exist_ok=True)
    sidecar = {"weights": "aa", "tokenizer": "bb"} | {k: v for k, v in changes.items() if k in ("weights", "tokenizer")}
    (fetched / "teacher.json").write_text(json.dumps(sidecar), encoding="utf-8")
    (fetched / "teacher/chat_template.jinja").write_text(changes.get("chat_template", "one"), encoding="utf-8")
    config = make_config()
    cache = Cache(top_k=changes.get("top_k", 8), sampler=changes.get("sampler", "random"))
    student = Student(reset_at_documents=changes.get("reset_at_documents", False))
    teacher = replace(config.teacher, name=changes.get("teacher", "tiny"))
    config = replace(config, cache=cache, student=student, teacher=teacher, seed=changes.get("seed", 0))
    return index_of(config, fetched)


CHANGES = {
    "teacher": "other", "weights": "cc", "tokenizer": "cc", "chat_template": "two", "reset_at_documents": True,
    "top_k": 9, "sampler": "hybrid", "seed": 1,
}  # fmt: skip


def test_targets_made_as_expected_are_accepted(tmp_path):
    write_note(tmp_path, {**index(tmp_path), "data": "dd"})
    check_targets(tmp_path, {**index(tmp_path), "data": "dd"})
    assert read_note(tmp_path)["temperature"] == 1


@pytest.mark.parametrize("key", CHANGES)
def test_a_run_with_another_value_refuses_them_and_shows_both(tmp_path, key):
    write_note(tmp_path, index(tmp_path))
    other = index(tmp_path, **{key: CHANGES[key]})
    with pytest.raises(Mistake, match=f"made with {key}={read_note(tmp_path)[key]}, this run has {key}={other[key]};"):
        check_targets(tmp_path, other)


@pytest.mark.parametrize("key", ["codec", "temperature", "data"])
def test_another_codec_temperature_or_data_are_refused_and_shown(tmp_path, key):
    write_note(tmp_path, {**index(tmp_path), "data": "dd", key: 99})
    wanted = {**index(tmp_path), "data": "dd"}
    assert wanted["codec"] == codec.VERSION
    with pytest.raises(Mistake, match=f"made with {key}=99, this run has {key}={wanted[key]};"):
        check_targets(tmp_path, wanted)


def test_the_seed_is_of_no_account_where_nothing_is_drawn(tmp_path):
    assert index(tmp_path, sampler="topk", seed=1) == index(tmp_path, sampler="topk", seed=2)


def test_the_chat_template_is_found_in_either_of_its_files(tmp_path):
    assert chat_template_hash(tmp_path) == "none"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "one"}), encoding="utf-8")
    first = chat_template_hash(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert chat_template_hash(tmp_path) == "none"
    (tmp_path / "chat_template.jinja").write_text("one", encoding="utf-8")
    assert chat_template_hash(tmp_path) == first != "none"


def test_shards_without_targets_are_refused(tmp_path):
    with pytest.raises(Mistake, match=r"holds no teacher targets.*run stage=cache"):
        check_targets(tmp_path, {})
    for text, why in (("{", "damaged, not JSON"), ("[]", "damaged, not a note")):
        (tmp_path / "targets.json").write_text(text, encoding="utf-8")
        with pytest.raises(Mistake, match=why):
            check_targets(tmp_path, {})
