"""Documents become samples of T + 1 tokens that predict each token once, with masks and a held-out split."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from data_support import ALONE, CHATML, TEXT, NeverStop, make_config, make_fetched, make_job, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.schema import Source, pieces_of
from xlstm_distill.data import encode as encode_module
from xlstm_distill.data import sources as sources_module
from xlstm_distill.data import tokenize as tokenize_module
from xlstm_distill.data.chat import Chat
from xlstm_distill.data.encode import Encoded, Encoder, draw, encode_documents, load_tokenizer
from xlstm_distill.data.fetch_teacher import tokenizer_hash
from xlstm_distill.data.shards import count_samples
from xlstm_distill.data.stream import read_samples
from xlstm_distill.data.tokenize import Packer, join_pieces, run
from xlstm_distill.stages import run_job

pytestmark = pytest.mark.usefixtures("signal_handlers")

CHAT = Chat([
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": " quick é☃ "},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "brown"},
])  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def documents(count: int) -> list[str]:
    words = TEXT.split()
    return [" ".join(words[(7 * i + j) % len(words)] for j in range(5 + i % 9)) + f" {i}" for i in range(count)]


def finished_tokenize(tmp_path, tokenizer, texts, **data):
    tmp_path.mkdir(parents=True, exist_ok=True)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    config = make_config({"mine": Source(kind="jsonl", path=str(file))}, **data)
    make_fetched(tmp_path, config, tokenizer)
    return make_job(tmp_path, "tokenize", config, inputs=("fetch",), pieces=("mine",))


class Kept(list):
    write = list.append


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 12))
def test_every_token_but_the_first_and_the_counted_rest_is_predicted_exactly_once(lengths, sequence):
    packer, start = Packer(kept := Kept(), sequence), 0
    for length in lengths:
        packer.add(Encoded(np.arange(start, start + length), np.ones(length), 0.0))
        start += length
    predicted = [token for sample in kept for token in sample["tokens"][1:]]
    assert all(len(sample["tokens"]) == sequence + 1 for sample in kept)
    assert predicted == list(range(1, start - packer.remainder)) or not kept
    assert packer.remainder < sequence or not kept
    assert packer.facts()["tokens"] == start
    assert len(kept) == packer.samples == max(0, start - 1) // sequence
    for before, after in itertools.pairwise(kept):
        assert before["tokens"][-1] == after["tokens"][0]


def test_masks_and_document_numbers_stay_with_their_tokens():
    packer = Packer(kept := Kept(), 4)
    for number, length in enumerate((3, 5, 2)):
        packer.add(Encoded(np.full(length, number), np.full(length, number % 2), 0.0))
    assert [s["document"].tolist() for s in kept] == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 2]]
    assert [s["mask"].tolist() for s in kept] == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 0]]


def encode_chat(folder, chat):
    (encoded,) = Encoder(folder, "chat")([chat])
    return encoded.tokens.tolist(), encoded.mask.tolist()


def test_text_ends_with_one_eos_and_every_token_counts(tokenizer):
    tok = load_tokenizer(tokenizer)
    for text in ("the fox", "the fox</s>"):
        (encoded,) = Encoder(tokenizer, "text")([text])
        assert encoded.tokens.tolist() == [*tok.encode("the fox"), tok.eos_token_id]
        assert encoded.mask.all()


def test_bos_is_the_tokenizers_own_choice(tmp_path, tokenizer):
    with_bos = make_tokenizer(tmp_path, bos=True)
    assert Encoder(with_bos, "text")(["fox"])[0].tokens[0] == load_tokenizer(with_bos).bos_token_id
    assert Encoder(tokenizer, "text")(["fox"])[0].tokens[0] != load_tokenizer(tokenizer).bos_token_id


def test_of_a_chat_the_assistants_turns_and_their_ends_count_and_nothing_else(tokenizer):
    tok = load_tokenizer(tokenizer)
    tokens, mask = encode_chat(tokenizer, CHAT)
    assert tok.decode(tokens) == tok.apply_chat_template(CHAT, tokenize=False)
    counted = tok.decode([t for t, m in zip(tokens, mask, strict=True) if m])
    assert counted == " quick é☃ <|im_end|>brown<|im_end|>"


def test_a_chat_that_the_assistant_opens_is_masked_too(tokenizer):
    tok = load_tokenizer(tokenizer)
    tokens, mask = encode_chat(tokenizer, Chat([CHAT[4], CHAT[1]]))
    assert tok.decode([t for t, m in zip(tokens, mask, strict=True) if m]) == "brown<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    forgetful = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '')")
    with pytest.raises(Mistake, match="changes earlier turns when later ones come, so turn 3 of a chat of 5"):
        encode_chat(make_tokenizer(tmp_path, template=forgetful), CHAT)


def test_what_the_template_refuses_is_one_line(tmp_path):
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    with pytest.raises(Mistake, match=r"refuses a chat of the roles system, user, .*\(user first\)"):
        encode_chat(make_tokenizer(tmp_path, template=strict), CHAT)


def test_a_tokenizer_without_eos_or_template_is_refused(tmp_path):
    bare = make_tokenizer(tmp_path, template="", eos=False)
    with pytest.raises(Mistake, match="no EOS token"):
        Encoder(bare, "text")
    with pytest.raises(Mistake, match="no chat template"):
        Encoder(bare, "chat")


def test_the_draw_depends_on_the_text_alone_and_is_spread_evenly():
    draws = np.array([draw(f"document {i}") for i in range(4000)])
    assert draw("same") == draw("same")
    assert draw(CHAT) == draw(Chat(dict(reversed(m.items())) for m in CHAT))
    assert np.abs(np.histogram(draws, 10, (0, 1))[0] - 400).max() < 100


TRICKY = [
    "a  b\t\tc \n\n d\r\n", " leading", "trailing ", "é☃𝄞 ﬁ e\u0301 \u00a0\u200b", "</s> in <s>the</s></s>",
    "<|im_end|> fox", "\x00\x01", "1234567890", "don't DON'T", "x" * 5000, "the " * 3000, "\n", ".",
    "汉字かな한글", "👩‍👩‍👧‍👦",
]  # fmt: skip


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_are_those_of_the_hugging_face_tokenizer_whatever_stands_in_the_text(tmp_path, bos):
    folder = make_tokenizer(tmp_path, bos=bos)
    tok = load_tokenizer(folder)
    for text, encoded in zip(TRICKY, Encoder(folder, "text")(TRICKY), strict=True):
        wanted = tok(text)["input_ids"]
        assert encoded.tokens.tolist() == (wanted if wanted[-1:] == [tok.eos_token_id] else [*wanted, tok.eos_token_id])


def test_truncation_and_padding_that_a_tokenizer_file_asks_for_do_not_take_place(tmp_path, tokenizer):
    settings = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    cut = make_tokenizer(tmp_path)
    (cut / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    (long,) = Encoder(cut, "text")([TEXT])
    assert long.tokens.tolist() == Encoder(tokenizer, "text")([TEXT])[0].tokens.tolist()
    assert len(long.tokens) > 4


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_in_passages_gives_the_tokens_of_the_whole(tmp_path, monkeypatch, bos):
    monkeypatch.setattr(sources_module, "PASSAGE", 160)
    encoder = Encoder(make_tokenizer(tmp_path, bos=bos), "text")
    text = "\n".join(f"{TEXT[: 9 + 3 * n]} {n}" for n in range(20))
    parts = list(sources_module._split(text))
    assert len(parts) > 5
    assert "".join(part.text for part in parts) == text
    assert [(part.first, part.last) for part in parts] == [(n == 0, n == len(parts) - 1) for n in range(len(parts))]
    (whole,) = encoder([text])
    assert np.concatenate([part.tokens for part in encoder(parts)]).tolist() == whole.tokens.tolist()


def test_passages_are_packed_as_one_document_on_the_side_of_the_first():
    packer = Packer(kept := Kept(), 4)
    for first, last in ((True, False), (False, False), (False, True), (True, True)):
        packer.add(Encoded(np.arange(2), np.ones(2), 0.0, first, last))
    assert packer.documents == 2
    assert [s["document"].tolist() for s in kept] == [[0, 0, 0, 0, 0]]


THREADS = """
import sys
from dataclasses import replace
from pathlib import Path
from xlstm_distill.data import encode
encode.CHUNK_DOCUMENTS = 7
documents = [f"the quick brown fox {n} " * (n % 40 + 1) for n in range(300)]
found = encode.encode_documents(documents, encode.Encoder(Path(sys.argv[1]), "text"))
print([d.tokens.tolist() for chunk in found for d in chunk])
"""


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(tokenizer):
    outputs = [
        subprocess.run(
            [sys.executable, "-c", THREADS, str(tokenizer)],
            env=os.environ | {"RAYON_NUM_THREADS": threads}, capture_output=True, check=True,
        ).stdout
        for threads in ("1", "3")
    ]  # fmt: skip
    assert outputs[0] == outputs[1]
    assert outputs[0].count(b"[") == 301


def test_a_mistake_in_a_thread_arrives_as_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 1)
    bad = Chat([{"role": "assistant", "content": " "}])
    with pytest.raises(Mistake, match="opens with the assistant"):
        list(encode_documents([CHAT, CHAT, bad], Encoder(tokenizer, "chat")))


def test_a_source_becomes_two_splits_that_hold_every_document_once(tmp_path, tokenizer):
    texts = [*documents(80), "", *documents(3)]
    job = finished_tokenize(tmp_path, tokenizer, texts)
    run(job, ALONE, NeverStop())
    facts = read_manifest(job.piece_path("mine")).facts
    assert (facts["documents"], facts["empty"], facts["unanswered"], facts["dropped"]) == (84, 1, 0, 0)
    assert facts["train"]["documents"] + facts["validation"]["documents"] == 83
    tok = load_tokenizer(tokenizer)
    for split in ("train", "validation"):
        wanted = [t for t in texts if t and (draw(t) < 0.2) == (split == "validation")]
        stream = [token for text in wanted for token in [*tok.encode(text), tok.eos_token_id]]
        folder, counts = job.output / "mine" / split, facts[split]
        batch = read_samples(folder, 10_000)
        kept = [*batch.tokens[:, :-1].flatten().tolist(), batch.tokens[-1, -1].item()]
        assert kept == stream[: len(kept)]
        assert counts == {
            "documents": len(wanted),
            "tokens": len(stream),
            "samples": count_samples(folder),
            "remainder": len(stream) - len(kept),
        }
        assert batch.document[0, 0] == 0
        assert batch.document.diff().min() >= 0


def test_a_finished_source_is_not_done_again_and_another_element_takes_none(tmp_path, tokenizer):
    job = finished_tokenize(tmp_path, tokenizer, documents(80))
    run(job, World(element=1, elements=2), NeverStop())
    assert not job.piece_path("mine").exists()
    run(job, ALONE, NeverStop())
    before = (job.output / "mine" / "train" / "index.json").stat().st_mtime_ns
    run(job, ALONE, NeverStop())
    assert (job.output / "mine" / "train" / "index.json").stat().st_mtime_ns == before


def test_the_same_documents_give_the_same_bytes(tmp_path, tokenizer):
    outputs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        job = finished_tokenize(tmp_path / name, tokenizer, documents(80))
        run(job, ALONE, NeverStop())
        outputs.append(read_manifest(job.piece_path("mine")).outputs)
    assert outputs[0] == outputs[1]


def test_a_stop_leaves_nothing_half_done(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 10)

    class StopAtOnce:
        def check(self):
            raise Stopped("now")

    job = finished_tokenize(tmp_path, tokenizer, documents(80))
    with pytest.raises(Stopped):
        run(job, ALONE, StopAtOnce())
    assert not list(job.output.iterdir())
    assert not job.piece_path("mine").exists()


@pytest.mark.parametrize(
    ("texts", "data", "message"),
    [
        (
            documents(3),
            {"validation": 1e-6},
            r"source mine: its validation split has 0 of 3 .*raise data.validation=1e-06",
        ),
        (documents(80), {"validation": 0.999999}, r"its train split has 0 of 80 documents and 0 tokens"),
        (documents(20), {"sequence": 4096}, r"less than one sample of 4097; give more text or lower data.sequence"),
    ],
)
def test_a_source_too_small_for_both_splits_is_refused_with_advice(tmp_path, tokenizer, texts, data, message):
    job = finished_tokenize(tmp_path, tokenizer, texts, **data)
    with pytest.raises(Mistake, match=message):
        run(job, ALONE, NeverStop())


def test_more_than_one_rank_is_refused(tmp_path, tokenizer):
    job = finished_tokenize(tmp_path, tokenizer, documents(9))
    with pytest.raises(Mistake, match="got 2 ranks"):
        run(job, World(size=2), NeverStop())


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_a_source_without_documents_is_one_line(tmp_path, tokenizer, texts):
    job = finished_tokenize(tmp_path, tokenizer, texts)
    with pytest.raises(Mistake, match=rf"source mine: holds no documents \({len(texts)} without text, 0 chats "):
        run(job, ALONE, NeverStop())
    assert not list(job.output.iterdir())


def test_counts_that_do_not_add_up_end_the_job(tmp_path, tokenizer, monkeypatch):
    job = finished_tokenize(tmp_path, tokenizer, documents(80))
    monkeypatch.setattr(tokenize_module, "encode_documents", lambda *a: [c[1:] for c in encode_documents(*a)])
    with pytest.raises(RuntimeError, match="80 documents read, 79 written, 0 empty, 0 unanswered, 0 dropped"):
        run(job, ALONE, NeverStop())
    monkeypatch.undo()
    monkeypatch.setattr(tokenize_module, "count_samples", lambda folder: count_samples(folder) - 1)
    with pytest.raises(RuntimeError, match=r"samples of 16 were written, of \{'documents'"):
        run(job, ALONE, NeverStop())
    assert not list(job.output.iterdir())


def test_the_shards_say_by_which_tokenizer_they_were_made(tmp_path, tokenizer):
    job = finished_tokenize(tmp_path, tokenizer, documents(80))
    run(job, ALONE, NeverStop())
    note = json.loads((job.output / "mine" / "tokens.json").read_text(encoding="utf-8"))
    assert note == {"tokenizer": tokenizer_hash(tokenizer)}


@pytest.mark.slow
def test_a_disk_that_fills_up_midway_is_one_line_and_leaves_no_part(tmp_path, tokenizer):
    job = finished_tokenize(tmp_path, tokenizer, documents(20_000), sequence=64)
    small = f"mount -t tmpfs -o size=200k none {job.output} && {sys.executable} -m xlstm_distill {job.path}"
    listing = f"{small}; code=$?; ls -A {job.output}; exit $code"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", listing], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "No space left on device; make room" in done.stderr
    assert done.stdout == ""


def test_a_source_in_parts_is_tokenised_by_several_elements_and_read_as_one(tmp_path, tokenizer):
    texts = documents(90)
    job = finished_tokenize(tmp_path, tokenizer, texts)
    source = replace(job.config.sources["mine"], parts=3, limit=85)
    config = replace(job.config, data=replace(job.config.data, sources={"mine": source}))
    job = make_job(tmp_path, "tokenize", config, inputs=("fetch",), pieces=pieces_of("mine", source))
    assert job.job.pieces == ("mine/0", "mine/1", "mine/2")
    for element in (2, 0, 1):
        assert not (job.output / "mine" / "train").exists()
        run(job, World(element=element, elements=3), NeverStop())
    join_pieces(job)
    facts = [read_manifest(job.piece_path(piece)).facts for piece in job.job.pieces]
    assert [f["documents"] for f in facts] == [29, 28, 28]
    tok = load_tokenizer(tokenizer)
    for split in ("train", "validation"):
        whole = read_samples(job.output / "mine" / split, 10_000)
        assert len(whole.tokens) == sum(f[split]["samples"] for f in facts)
        row = 0
        for part, counts in enumerate(f[split] for f in facts):
            mine = [t for t in texts[:85][part::3] if (draw(t) < 0.2) == (split == "validation")]
            stream = [token for text in mine for token in [*tok.encode(text), tok.eos_token_id]]
            kept = whole.tokens[row : row + counts["samples"]]
            row += counts["samples"]
            assert [*kept[:, :-1].flatten().tolist(), kept[-1, -1].item()] == stream[: kept[:, :-1].numel() + 1]
    assert (job.output / "mine" / "tokens.json").exists()


def job_in_parts(tmp_path, tokenizer, parts: int):
    job = finished_tokenize(tmp_path, tokenizer, documents(90))
    source = replace(job.config.sources["mine"], parts=parts)
    config = replace(job.config, data=replace(job.config.data, sources={"mine": source}))
    return make_job(tmp_path, "tokenize", config, inputs=("fetch",), pieces=pieces_of("mine", source))


def test_the_number_of_elements_changes_no_byte(tmp_path, tokenizer):
    outputs = []
    for elements in (1, 2, 3):
        (folder := tmp_path / str(elements)).mkdir()
        job = job_in_parts(folder, tokenizer, 3)
        for element in reversed(range(elements)):
            run(job, World(element=element, elements=elements), NeverStop())
        outputs.append([read_manifest(job.piece_path(piece)).outputs for piece in job.job.pieces])
    assert outputs[0] == outputs[1] == outputs[2]
    assert all(outputs[0])


def bounded(job, tokens: int, **changes):
    """The job `finished_tokenize` made, of whose source so many tokens are wanted."""
    source = replace(job.config.sources["mine"], tokens=tokens, **changes)
    config = replace(job.config, data=replace(job.config.data, sources={"mine": source}))
    return make_job(job.path.parent, "tokenize", config, inputs=("fetch",), pieces=pieces_of("mine", source))


def facts_of(job, piece: str = "mine"):
    return read_manifest(job.piece_path(piece)).facts


def tokens_in(facts) -> int:
    return facts["train"]["tokens"] + facts["validation"]["tokens"]


@pytest.fixture
def short_chunks(monkeypatch):
    """Several chunks are under way when the budget is reached."""
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 5)


@pytest.mark.usefixtures("short_chunks")
def test_a_source_ends_with_the_document_that_reaches_its_budget(tmp_path, tokenizer, capsys):
    texts = [*documents(40), "", *documents(200)]
    job = bounded(finished_tokenize(tmp_path, tokenizer, texts), 2000)
    run(job, ALONE, NeverStop())
    facts, tok = facts_of(job), load_tokenizer(tokenizer)
    lengths = [len(tok.encode(text)) + 1 for text in texts if text]
    count = next(n for n in range(len(lengths)) if sum(lengths[:n]) >= 2000)
    assert facts["stopped_at"] == 2000
    assert tokens_in(facts) == sum(lengths[:count]) < 2000 + max(lengths)
    assert sum(facts[split]["documents"] for split in ("train", "validation")) == count < 200
    assert (facts["documents"], facts["empty"]) == (count + 1, 1)
    assert "fewer" not in capsys.readouterr().out


@pytest.mark.usefixtures("short_chunks")
def test_the_rest_of_a_bounded_source_is_not_read(tmp_path, tokenizer):
    file = tmp_path / "texts.jsonl"
    job = bounded(finished_tokenize(tmp_path, tokenizer, documents(200)), 1000)
    with file.open("a") as opened:
        opened.write("no JSON, which would end the job\n")
    run(job, ALONE, NeverStop())
    assert tokens_in(facts_of(job)) >= 1000


def test_what_is_under_way_when_the_budget_is_reached_changes_nothing(tmp_path, tokenizer, monkeypatch):
    outputs = []
    for size in (2, 7, 5000):
        monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", size)
        job = bounded(finished_tokenize(tmp_path / str(size), tokenizer, documents(200)), 1500)
        run(job, ALONE, NeverStop())
        outputs.append((read_manifest(job.piece_path("mine")).outputs, facts_of(job)))
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_larger_budget_goes_on_where_a_smaller_one_ended(tmp_path, tokenizer):
    tokens = {}
    for budget in (1500, 3000):
        job = bounded(finished_tokenize(tmp_path / str(budget), tokenizer, documents(300)), budget)
        run(job, ALONE, NeverStop())
        tokens[budget] = read_samples(job.output / "mine" / "train", 10_000).tokens
    assert len(tokens[1500]) < len(tokens[3000])
    assert tokens[3000][: len(tokens[1500])].equal(tokens[1500])


@pytest.mark.usefixtures("short_chunks")
def test_each_part_of_a_bounded_source_makes_its_share_whatever_the_number_of_elements(tmp_path, tokenizer):
    outputs = []
    for elements in (1, 3):
        job = finished_tokenize(tmp_path / str(elements), tokenizer, documents(300))
        job = bounded(job, 3000, parts=3)
        for element in reversed(range(elements)):
            run(job, World(element=element, elements=elements), NeverStop())
        found = [facts_of(job, piece) for piece in job.job.pieces]
        assert [facts["stopped_at"] for facts in found] == [1000, 1000, 1000]
        assert all(1000 <= tokens_in(facts) < 1100 for facts in found)
        outputs.append([read_manifest(job.piece_path(piece)).outputs for piece in job.job.pieces])
    assert outputs[0] == outputs[1]


@pytest.mark.usefixtures("short_chunks")
def test_a_budget_does_not_end_before_each_split_has_a_sample(tmp_path, tokenizer):
    job = bounded(finished_tokenize(tmp_path, tokenizer, documents(300), validation=0.02), 1)
    run(job, ALONE, NeverStop())
    facts = facts_of(job)
    assert facts["validation"]["samples"] == 1
    assert facts["train"]["samples"] > 1


@pytest.mark.parametrize(("parts", "told"), [(1, "source mine: "), (2, "source mine/1: ")])
def test_fewer_tokens_than_wanted_are_told_in_a_line_and_go_on(tmp_path, tokenizer, capsys, parts, told):
    job = bounded(finished_tokenize(tmp_path, tokenizer, documents(90)), 10_000, parts=parts)
    run(job, ALONE, NeverStop())
    facts = facts_of(job, job.job.pieces[-1])
    assert facts["stopped_at"] == 0
    line = f"{told}{tokens_in(facts)} tokens, fewer than the {10_000 // parts} that are wanted of it"
    assert sum(row.startswith(line) for row in capsys.readouterr().out.splitlines()) == 1


@pytest.mark.usefixtures("short_chunks")
def test_a_long_document_at_the_end_of_the_budget_is_whole_and_one_behind_it_is_left_out(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(sources_module, "PASSAGE", 160)
    long = "\n".join([TEXT] * 60)
    texts = [*documents(60), long, *[f"{long} {n}" for n in range(9)]]
    tok = load_tokenizer(tokenizer)
    lengths = [len(tok.encode(text)) + 1 for text in texts]
    job = bounded(finished_tokenize(tmp_path, tokenizer, texts), sum(lengths[:60]) + 10)
    run(job, ALONE, NeverStop())
    facts = facts_of(job)
    assert facts["documents"] == 61
    assert tokens_in(facts) == sum(lengths[:61])


def as_element(monkeypatch, element: int, elements: int) -> None:
    monkeypatch.setenv("XDL_ELEMENT", str(element))
    monkeypatch.setenv("XDL_ELEMENTS", str(elements))


def test_whoever_writes_the_manifest_has_joined_the_parts_though_another_finishes_last_and_dies(
    tmp_path, tokenizer, monkeypatch
):
    job = job_in_parts(tmp_path, tokenizer, 2)

    def other_finishes_meanwhile(folder, world, stop):
        facts = run(folder, world, stop)
        run(folder, World(element=0, elements=2), stop)
        return facts

    monkeypatch.setattr(tokenize_module, "run", other_finishes_meanwhile)
    as_element(monkeypatch, 1, 2)
    run_job(job.path)
    outputs = read_manifest(job.manifest_path).outputs
    assert {"mine/train/index.json", "mine/validation/index.json", "mine/tokens.json"} <= set(outputs)
    assert count_samples(job.output / "mine" / "train")


def test_an_element_that_is_not_the_last_neither_joins_nor_writes_the_manifest(tmp_path, tokenizer, monkeypatch):
    job = job_in_parts(tmp_path, tokenizer, 2)
    as_element(monkeypatch, 1, 2)
    run_job(job.path)
    assert job.piece_done("mine/1")
    assert not job.manifest_path.exists()
    assert not (job.output / "mine" / "train").exists()


def test_two_elements_that_finish_at_once_write_the_same_manifest(tmp_path, tokenizer, monkeypatch):
    job = job_in_parts(tmp_path, tokenizer, 2)
    run(job, ALONE, NeverStop())
    digests, real = [], JobFolder.finish

    def finish(folder, facts, piece=""):
        digests.append(real(folder, facts, piece).digest)
        if len(digests) == 1:  # the other one joins and hashes while this one is about to end
            run_job(job.path)

    monkeypatch.setattr(JobFolder, "finish", finish)
    run_job(job.path)
    assert len(digests) == 2
    assert digests[0] == digests[1] == read_manifest(job.manifest_path).digest


def test_chats_without_an_answer_are_told_with_their_roles_counted_and_add_up(tmp_path, tokenizer, capsys):
    roles = ["assistant"] * 60 + ["gpt"] * 20 + ["Assistant"] * 10
    chats = [
        [{"role": "user", "content": f"fox {n}?"}, {"role": role, "content": "dog"}] for n, role in enumerate(roles)
    ]
    job = finished_tokenize(tmp_path, tokenizer, [])
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in [*chats, []]), encoding="utf-8")
    source = Source(kind="jsonl", path=str(file), format="chat", field="messages")
    config = replace(job.config, data=replace(job.config.data, sources={"mine": source}))
    job = make_job(tmp_path, "tokenize", config, inputs=("fetch",), pieces=("mine",))
    run(job, ALONE, NeverStop())
    facts = read_manifest(job.piece_path("mine")).facts
    written = sum(facts[split]["documents"] for split in ("train", "validation"))
    assert (facts["documents"], written) == (91, 60)
    assert (facts["empty"], facts["unanswered"], facts["dropped"]) == (1, 30, 0)
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert told.startswith("source mine: left out 30 of 91 documents: chats without")
    assert told.endswith("unknown roles: 'Assistant', 'gpt'")
    assert json.loads((job.path / "metrics.jsonl").read_text().splitlines()[-1])["unanswered/mine"] == 30


def test_a_source_of_unanswered_chats_alone_is_one_line(tmp_path, tokenizer):
    job = finished_tokenize(tmp_path, tokenizer, ["fox?"] * 7)
    source = replace(job.config.sources["mine"], format="chat")
    config = replace(job.config, data=replace(job.config.data, sources={"mine": source}))
    job = make_job(tmp_path, "tokenize", config, inputs=("fetch",), pieces=("mine",))
    with pytest.raises(Mistake, match=r"holds no documents \(0 without text, 7 chats without an answer\); mend its"):
        run(job, ALONE, NeverStop())


def test_parts_are_joined_by_a_later_start_too(tmp_path, tokenizer):
    job = job_in_parts(tmp_path, tokenizer, 2)
    run_job(job.path)
    shutil.rmtree(job.output / "mine" / "train")
    job.manifest_path.unlink()
    run_job(job.path)
    assert count_samples(job.output / "mine" / "train")
