"""Training documents that share 13 words in a row with the evaluation are found, counted, and dropped on request."""

import json
import random
import re
from dataclasses import replace

import pytest
from data_support import ALONE, NeverStop, make_config, make_fetched, make_job, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.schema import Eval, Source
from xlstm_distill.data.chat import Chat
from xlstm_distill.data.overlap import WORDS, Overlap, last_words
from xlstm_distill.data.sieve import Sieve, make_sieve
from xlstm_distill.data.sources import Passage, text_of
from xlstm_distill.data.tokenize import run

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def grams(text: str) -> set[tuple[str, ...]]:
    """The reference: 13-grams of words in lower case."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_what_is_found_is_what_sets_of_n_grams_find(seed):
    rng = random.Random(seed)
    text = lambda size: " ".join(rng.choices("ab", k=size))  # noqa: E731
    sets = {"one": [text(rng.randint(5, 40)) for _ in range(20)], "two": [text(20)]}
    overlap, document = Overlap(sets), text(rng.randint(1, 60))
    owner = {}
    for name, texts in sets.items():
        for gram in set().union(*map(grams, texts)):
            owner.setdefault(gram, name)
    assert set(overlap(document)) == {owner[gram] for gram in grams(document) if gram in owner}
    assert overlap.short == sum(not grams(t) for texts in sets.values() for t in texts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (QUESTION, True),
        (f"Q: {QUESTION.upper().replace(' ', '  ')} A: 72", True),
        (QUESTION.replace(",", " — ").replace("clips", "“clips”"), True),
        ("\n".join(QUESTION.split()[:13]), True),
        (" ".join(QUESTION.split()[:12]), False),
        (QUESTION.replace("and then she", "then she"), False),
        (QUESTION.replace("April", "Aprils").replace("half", "third"), False),
    ],
)
def test_case_spaces_and_punctuation_do_not_matter_and_one_other_word_does(text, found):
    assert Overlap({"gsm": [QUESTION]})(text) == (["gsm"] if found else [])


def documents() -> list[str]:
    texts = [f"document {n} about the quick brown fox and {n * 7} lazy dogs in a row of trees" for n in range(60)]
    return [*texts, f"Look: {QUESTION}", "tail " * 20]


def finished_tokenize(tmp_path, overlap: str, texts: list[str], **eval_texts: Source):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n", encoding="utf-8")
    gsm = Source(kind="jsonl", path=str(tmp_path / "questions.jsonl"), field="question")
    config = make_config({"mine": Source(kind="jsonl", path=str(file))}, overlap=overlap)
    config = replace(config, eval=Eval(texts={"gsm": gsm, **eval_texts}))
    make_fetched(tmp_path, config, make_tokenizer(tmp_path / "tokenizer"))
    job = make_job(tmp_path, "tokenize", config, inputs=("fetch",), pieces=("mine",))
    run(job, ALONE, NeverStop())
    return job, read_manifest(job.piece_path("mine")).facts


@pytest.mark.parametrize("policy", ["count", "drop"])
def test_the_manifest_counts_what_is_shared_and_what_was_dropped(tmp_path, policy):
    job, facts = finished_tokenize(tmp_path, policy, documents())
    assert facts["overlap"] == {"documents": 1, "passages_dropped": 0, "sets": {"gsm": 1}}
    assert facts["dropped"] == (1 if policy == "drop" else 0)
    assert facts["documents"] == 62 == sum(facts[s]["documents"] for s in ("train", "validation")) + facts["dropped"]
    logged = [json.loads(line) for line in (job.path / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["overlap/mine"] == 1


def test_of_a_long_document_only_the_passage_is_dropped_and_the_document_counts_once():
    texts = ["start", QUESTION, f"{QUESTION} twice", "end"]
    parts = [Passage(text, n == 0, n == 3) for n, text in enumerate(texts)]
    sieve = Sieve(Overlap({"gsm": [QUESTION]}), drop=True)
    assert [part.text for part in sieve(parts)] == ["start", "", "", "end"]
    assert (sieve.documents, sieve.dropped, sieve.passages, sieve.counts) == (1, 0, 2, {"gsm": 1})
    assert [(part.first, part.last) for part in sieve(parts)] == [(p.first, p.last) for p in parts]


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="ab1é “—-.", max_size=80), st.data())
def test_wherever_a_long_text_is_cut_its_passages_share_what_the_whole_shares(text, data):
    whole = text + QUESTION + text
    at, overlap = data.draw(st.integers(1, len(text + QUESTION))), Overlap({"gsm": [QUESTION]})
    sieve = Sieve(overlap, drop=False)
    assert len(list(sieve([Passage(whole[:at], True, False), Passage(whole[at:], False, True), "b " * 20]))) == 3
    assert sieve.documents == bool(overlap(whole))


def test_thirteen_words_are_found_wherever_they_are_cut():
    shared = " ".join(QUESTION.split()[:13])
    for at in range(1, len(shared)):
        sieve = Sieve(Overlap({"gsm": [QUESTION]}), drop=False)
        list(sieve([Passage(f"once {shared[:at]}", True, False), Passage(f"{shared[at:]} more", False, True)]))
        assert sieve.documents == 1


def test_the_last_words_are_as_many_as_an_n_gram_has():
    text = " ".join(f"w{n}" for n in range(40))
    assert last_words(text) == " ".join(f"w{n}" for n in range(27, 40))
    assert last_words("one, two") == "one, two"
    assert len(last_words("x" * 10**5)) == 4096


def test_a_passage_is_dropped_for_what_it_shares_across_the_seam_but_not_for_what_went_with_the_one_before():
    half = len(QUESTION) // 2
    sieve = Sieve(Overlap({"gsm": [QUESTION]}), drop=True)
    parts = [Passage(QUESTION[:half], True, False), Passage(QUESTION[half:], False, False), Passage("end", False, True)]
    assert [part.text for part in sieve(parts)] == [QUESTION[:half], "", "end"]
    parts = [Passage(QUESTION, True, False), Passage(" and more", False, True)]
    assert [part.text for part in sieve(parts)] == ["", " and more"]


def test_what_tools_are_called_with_is_looked_through_too():
    call = {"function": {"name": "run", "arguments": {"code": f"# {QUESTION}\nprint(72)"}}}
    chat = Chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert Overlap({"gsm": [QUESTION]})(text_of(chat)) == ["gsm"]


def test_questions_of_the_evaluation_without_an_answer_are_looked_for(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": QUESTION}]}), encoding="utf-8")
    chats = Source(kind="jsonl", path=str(file), format="chat", field="messages")
    sieve = make_sieve(replace(make_config({}), eval=Eval(texts={"gsm": chats})), tmp_path)
    list(sieve([QUESTION]))
    assert sieve.documents == 1


def test_chats_are_looked_through_turn_by_turn():
    chat = Chat([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "72"}])
    assert list(Sieve(Overlap({"gsm": [QUESTION]}), drop=True)([chat])) == []


def test_a_downloaded_set_is_read_from_where_fetch_put_it_and_missed_by_name(tmp_path):
    with pytest.raises(Mistake, match=r"source arc: .*/fetch/output/evaluation/arc.jsonl is missing"):
        finished_tokenize(tmp_path, "count", documents(), arc=Source(kind="hub", path="allenai/ai2_arc"))
