"""A manifest records what was made from what; files are whole or absent; what changed afterwards is noticed."""

import json

import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic, hash_file, hash_value, write_atomic, write_json
from xlstm_distill.contract.manifest import (
    Manifest,
    outputs_of,
    read_manifest,
    verify_outputs,
    write_manifest,
)


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "output"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep/b.bin").write_bytes(b"\0" * 5000)
    (folder / ".hidden").write_text("no")
    return folder


def manifest(output, **changes):
    fields = {"job": "align", "stage": "align", "identity": {"x": [1, 2]}, "tokens": 8, "inputs": {"fetch": "ff"}}
    return Manifest(**{**fields, "outputs": outputs_of(output), **changes})


def test_it_is_read_as_it_was_written_with_the_time(tmp_path, output):
    written = manifest(output, facts={"loss": 0.5}, code={"version": "1"})
    write_manifest(tmp_path / "manifest.json", written)
    found = read_manifest(tmp_path / "manifest.json")
    assert found.finished.endswith("+00:00")
    assert {**vars(found), "finished": ""} == vars(written)
    assert found.digest == written.digest


def test_outputs_are_all_files_but_hidden_ones_links_followed(tmp_path, output):
    (output / "linked").symlink_to(output / "deep", target_is_directory=True)
    found = outputs_of(output)
    assert sorted(found) == ["a.txt", "deep/b.bin", "linked/b.bin"]
    assert found["deep/b.bin"] == {"bytes": 5000, "xxh64": hash_file(output / "deep/b.bin")}


def test_the_digest_depends_on_settings_inputs_outputs_and_budget_only(output):
    base = manifest(output).digest
    assert manifest(output, facts={"a": 1}, code={"version": "2"}, finished="then").digest == base
    for change in ({"identity": {}}, {"inputs": {}}, {"outputs": {}}, {"tokens": 9}, {"stage": "x"}):
        assert manifest(output, **change).digest != base
    assert hash_value({"a": 1, "b": 2}) == hash_value({"b": 2, "a": 1})


def test_missing_shorter_and_changed_outputs_are_told(output):
    made = manifest(output)
    assert verify_outputs(made, output, deep=True) is None
    (output / "a.txt").write_text("b")
    assert verify_outputs(made, output) is None
    assert "a.txt has xxh64" in verify_outputs(made, output, deep=True)
    (output / "a.txt").write_text("longer")
    assert "a.txt has 6 bytes, its manifest says 1" in verify_outputs(made, output)
    (output / "a.txt").unlink()
    assert verify_outputs(made, output).endswith("a.txt is missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 99}', "\x00"])
def test_what_is_no_manifest_is_one_line_that_names_the_file(tmp_path, text):
    path = tmp_path / "manifest.json"
    assert read_manifest(path) is None
    path.write_text(text)
    with pytest.raises(Mistake, match=r"manifest.json: not .*remove the file to redo the job"):
        read_manifest(path)


@pytest.mark.parametrize("change", [{"colour": 1}, {"outputs": None}])
def test_a_manifest_with_other_fields_is_one_line(tmp_path, output, change):
    path = tmp_path / "manifest.json"
    write_manifest(path, manifest(output))
    raw = json.loads(path.read_text())
    raw = {k: v for k, v in {**raw, **change}.items() if v is not None}
    path.write_text(json.dumps(raw))
    with pytest.raises(Mistake, match="remove the file to redo the job"):
        read_manifest(path)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"ä": 1})
    write_atomic(path, "second")
    assert path.read_text() == "second"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert path.read_text() == "second"


def test_a_folder_appears_whole_replaces_the_old_one_or_stays_as_it_was(tmp_path):
    target = tmp_path / "folder"
    with folder_atomic(target) as beside:
        (beside / "one").write_text("1")
        assert not target.exists()
    with folder_atomic(target) as beside:
        (beside / "two").write_text("2")
    assert [p.name for p in target.iterdir()] == ["two"]
    with pytest.raises(ValueError, match="half"), folder_atomic(target) as beside:  # noqa: PT012
        (beside / "three").write_text("3")
        raise ValueError("half")
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
