"""Documents become samples of T + 1 tokens that predict each token once, with masks and a held-out split."""

import itertools
import json

import numpy as np
import pytest
from data_support import ALONE, CHATML, TEXT, NeverStop, make_config, make_fetched, make_job, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import World
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.schema import Source
from xlstm_distill.data import encode as encode_module
from xlstm_distill.data.chat import encode_chat
from xlstm_distill.data.encode import Encoded, Encoder, draw, encode_documents, load_tokenizer
from xlstm_distill.data.shards import count_samples
from xlstm_distill.data.stream import read_samples
from xlstm_distill.data.tokenize import Packer, run

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": " quick é☃ "},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "brown"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def documents(count: int) -> list[str]:
    words = TEXT.split()
    return [" ".join(words[(7 * i + j) % len(words)] for j in range(5 + i % 9)) + f" {i}" for i in range(count)]


def finished_tokenize(tmp_path, tokenizer, texts, **data):
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
    tokens, mask = encode_chat(tok, CHAT)
    assert tok.decode(tokens) == tok.apply_chat_template(CHAT, tokenize=False)
    counted = tok.decode([t for t, m in zip(tokens, mask, strict=True) if m])
    assert counted == " quick é☃ <|im_end|>brown<|im_end|>"


def test_a_chat_that_the_assistant_opens_is_masked_too(tokenizer):
    tok = load_tokenizer(tokenizer)
    tokens, mask = encode_chat(tok, [CHAT[4], CHAT[1]])
    assert tok.decode([t for t, m in zip(tokens, mask, strict=True) if m]) == "brown<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    forgetful = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '')")
    with pytest.raises(Mistake, match="changes earlier turns when later ones come, so turn 3 of a chat of 5"):
        encode_chat(load_tokenizer(make_tokenizer(tmp_path, template=forgetful)), CHAT)


def test_what_the_template_refuses_is_one_line(tmp_path):
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    with pytest.raises(Mistake, match=r"refuses a chat of the roles system, user, .*\(user first\)"):
        encode_chat(load_tokenizer(make_tokenizer(tmp_path, template=strict)), CHAT)


def test_a_tokenizer_without_eos_or_template_is_refused(tmp_path):
    bare = make_tokenizer(tmp_path, template="", eos=False)
    with pytest.raises(Mistake, match="no EOS token"):
        Encoder(bare, "text")
    with pytest.raises(Mistake, match="no chat template"):
        Encoder(bare, "chat")


def test_the_draw_depends_on_the_text_alone_and_is_spread_evenly():
    draws = np.array([draw(f"document {i}") for i in range(4000)])
    assert draw("same") == draw("same")
    assert draw(CHAT) == draw([dict(reversed(m.items())) for m in CHAT])
    assert np.abs(np.histogram(draws, 10, (0, 1))[0] - 400).max() < 100


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "ALONE", 2)
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 5)
    alone, together = (
        [document for chunk in encode_documents(documents(60), tokenizer, "text", workers) for document in chunk]
        for workers in (1, 2)
    )
    assert len(alone) == len(together) == 60
    assert all((a.tokens == b.tokens).all() and a.draw == b.draw for a, b in zip(alone, together, strict=True))


@pytest.mark.slow
def test_a_mistake_in_another_process_arrives_as_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "ALONE", 1)
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 1)
    bad = [{"role": "assistant", "content": " "}]
    with pytest.raises(Mistake, match="opens with the assistant"):
        list(encode_documents([CHAT, CHAT, bad], tokenizer, "chat", 2))


def test_a_source_becomes_two_splits_that_hold_every_document_once(tmp_path, tokenizer):
    texts = [*documents(80), "", *documents(3)]
    job = finished_tokenize(tmp_path, tokenizer, texts)
    run(job, ALONE, NeverStop())
    facts = read_manifest(job.piece_path("mine")).facts
    assert facts["empty"] == 1
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
