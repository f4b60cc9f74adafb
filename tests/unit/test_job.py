"""The job folder: read as written, its inputs checked, its pieces done once."""

from dataclasses import replace

import pytest
import yaml
from data_support import make_config

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import Job, JobFolder, World
from xlstm_distill.contract.schema import Placement, Source
from xlstm_distill.stages import main


def folder(root, name="tokenize", **fields):
    config = make_config({"mine": Source(path="x*.txt", kind="text")})
    job = Job(name, name, {"data.sequence": 16, "list": [1, "two"]}, **fields)
    made = JobFolder(root / name, job, config)
    made.output.mkdir(parents=True)
    made.write()
    return made


def test_it_is_read_as_it_was_written(tmp_path):
    written = folder(
        tmp_path, inputs=("fetch",), pieces=("a", "b"), tokens=10**12, expert="math",
        placement=Placement(nodes=2, gpus_per_node=8, time="1-00:00:00"),
    )  # fmt: skip
    found = JobFolder.read(written.path)
    assert found == written
    assert (found.output, found.stop_file) == (written.path / "output", written.path / "stop")
    assert found.input("fetch") == tmp_path / "fetch/output"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "not a job folder"),
        ("a: [", "config.yaml: not YAML"),
        ("[1]", "expected the keys job and config"),
        ("", "expected the keys job and config"),
        ("{job: {}, config: {}, more: 1}", "expected the keys job and config"),
    ],
)
def test_what_is_no_job_is_one_line(tmp_path, text, told):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(Mistake, match=told) as caught:
        JobFolder.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("config", "data", "sequnce"), 3, "config.*data.sequnce: no such key|data.sequnce: no such key"),
        (("config", "data", "sequence"), "many", "data.sequence=many: expected a whole number"),
        (("job", "stages"), "x", "job.stages: no such key; the nearest is job.stage"),
        (("job", "tokens"), 1.5, "job.tokens=1.5: expected a whole number"),
    ],
)
def test_keys_and_values_that_do_not_fit_are_one_line(tmp_path, place, value, told):
    written = folder(tmp_path)
    raw = yaml.safe_load((written.path / "config.yaml").read_text())
    *parents, last = place
    inner = raw
    for key in parents:
        inner = inner[key]
    inner[last] = value
    (written.path / "config.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(Mistake, match=told):
        JobFolder.read(written.path)
    assert main([str(written.path)]) == 2


def test_an_unfinished_or_changed_input_is_named(tmp_path):
    fetch, tokenize = folder(tmp_path, "fetch"), folder(tmp_path, inputs=("fetch",))
    with pytest.raises(Mistake, match=r"tokenize: needs fetch, which is not finished \(no .*fetch/manifest.json\)"):
        tokenize.input_digests()
    (fetch.output / "x").write_text("abc")
    digest = fetch.finish({}).digest
    assert tokenize.input_digests() == {"fetch": digest}
    (fetch.output / "x").write_text("ab")
    with pytest.raises(Mistake, match=r"input fetch: .*x has 2 bytes, its manifest says 3"):
        tokenize.input_digests()


def test_each_piece_is_done_once_until_its_files_settings_or_inputs_change(tmp_path):
    fetch, job = folder(tmp_path, "fetch"), folder(tmp_path, inputs=("fetch",), pieces=("a", "b", "c"))
    fetch.finish({})
    for piece in ("a", "c"):
        (job.output / piece).mkdir()
        (job.output / piece / "x").write_text(piece)
        job.finish({"n": 1}, piece)
    assert job.piece_done("a").facts == {"n": 1}
    assert list(job.piece_done("a").outputs) == ["x"]
    assert job.my_pieces(World()) == ["b"]
    assert job.my_pieces(World(element=1, elements=2)) == ["b"]
    assert job.my_pieces(World(element=0, elements=2)) == []
    (job.output / "a/x").unlink()
    assert job.my_pieces(World()) == ["a", "b"]
    assert replace(job, job=replace(job.job, identity={"other": 1})).my_pieces(World()) == ["a", "b", "c"]
    (fetch.output / "new").write_text("x")
    fetch.finish({})
    assert job.my_pieces(World()) == ["a", "b", "c"]


def test_the_world_comes_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "XDL_ELEMENT", "XDL_ELEMENTS"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World()
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "XDL_ELEMENT": 2, "XDL_ELEMENTS": 5}.items():
        monkeypatch.setenv(name, str(value))
    assert World.from_environment() == World(3, 4, 1, 2, 5)


def test_no_job_folder_at_all_is_exit_code_2(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("usage: ")
    assert len(lines) == 2
