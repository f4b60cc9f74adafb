"""Documents come out of every kind of source alike, and a wrong source is one line."""

import json
from pathlib import Path

import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Source
from xlstm_distill.data.sources import open_source, stream_hub

TEXTS = ["first text", "second\ntext", "third ☃"]
CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(source: Source, fetched: Path = Path("/nowhere")) -> list:
    return list(open_source("mine", source, fetched))


def test_text_files_are_documents_in_the_order_of_their_names(tmp_path):
    for name, text in zip("bac", TEXTS, strict=True):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    assert read(Source(kind="text", path=f"{tmp_path}/*.txt")) == [TEXTS[1], TEXTS[0], TEXTS[2]]


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    jsonl(tmp_path / "a.jsonl", [{"body": text} for text in TEXTS])
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        opened = open_source("mine", Source(kind=kind, path=f"{tmp_path}/a.{kind}", field="body"), tmp_path)
        assert list(opened) == list(opened) == TEXTS
        assert opened.expected() == 3


@pytest.mark.parametrize("kind", ["demo", "hub"])
def test_what_was_fetched_is_read_from_there(tmp_path, kind):
    jsonl(tmp_path / "data" / "mine.jsonl", [{"text": text} for text in TEXTS])
    assert read(Source(kind=kind, path="math"), tmp_path) == TEXTS


def test_what_should_have_been_fetched_and_is_not_there_is_named(tmp_path):
    with pytest.raises(Mistake, match=f"source mine: {tmp_path}/data/mine.jsonl is missing"):
        read(Source(kind="hub", path="some/set"), tmp_path)


def test_empty_documents_are_counted_and_left_out_and_do_not_count_to_the_limit(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ["", "a", None, " \n", "b", "c"]])
    documents = open_source("mine", Source(kind="jsonl", path=str(file), limit=2), tmp_path)
    assert list(documents) == ["a", "b"]
    assert documents.empty == 3
    assert documents.expected() == 2


def test_messages_come_as_they_are(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": []}])
    documents = open_source("mine", Source(kind="jsonl", path=str(file), format="chat", field="messages"), tmp_path)
    assert list(documents) == [CHAT]
    assert documents.empty == 2


@pytest.mark.parametrize("question", ["2+2?", CHAT[:1]])
def test_a_question_and_an_answer_in_two_columns_make_a_chat(tmp_path, question):
    file = jsonl(tmp_path / "a.jsonl", [{"input": question, "output": "4"}, {"input": question, "output": ""}])
    assert read(Source(kind="jsonl", path=str(file), format="chat", field="input", answer="output")) == [CHAT]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field": "body"}, r"source mine: field=body: no such column in .*; there are text, number"),
        (
            {"format": "chat", "field": "text", "answer": "reply"},
            r"answer=reply: no such column in .*; there are text, number",
        ),
        ({"field": "number"}, "field=number holds int, not text"),
        ({"format": "chat", "field": "number"}, "column number holds no chat"),
    ],
)
def test_a_column_that_is_missing_or_holds_something_else_is_named(tmp_path, changes, message):
    file = jsonl(tmp_path / "a.jsonl", [{"text": "a", "number": 1}])
    with pytest.raises(Mistake, match=message):
        read(Source(kind="jsonl", path=str(file), **changes))


@pytest.mark.parametrize(("path", "hint"), [("nothing-*.txt", "no file matches"), (".", "it is a folder: add /\\*")])
def test_a_path_without_files_is_one_line(tmp_path, path, hint):
    with pytest.raises(Mistake, match=f"source mine: no file matches path=.*{hint if hint[0] == 'i' else ''}") as error:
        read(Source(kind="text", path=f"{tmp_path}/{path}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "content"), [("jsonl", '{"text": "a"}\n{"text": \n'), ("parquet", "no parquet")])
def test_a_broken_file_is_one_line(tmp_path, kind, content):
    (tmp_path / "a").write_text(content, encoding="utf-8")
    with pytest.raises(Mistake, match=f"source mine: path=.* cannot be read as {kind}") as error:
        read(Source(kind=kind, path=f"{tmp_path}/a"))
    assert "\n" not in str(error.value)


def test_a_data_set_laid_out_as_on_the_hub_is_streamed_and_its_columns_checked(tmp_path):
    jsonl(tmp_path / "set" / "train.jsonl", [{"text": text} for text in TEXTS])
    source = Source(kind="hub", path=str(tmp_path / "set"))
    assert [row["text"] for row in stream_hub("mine", source)] == TEXTS
    with pytest.raises(Mistake, match=r"field=body: no such column in .*; there are text"):
        list(stream_hub("mine", Source(kind="hub", path=str(tmp_path / "set"), field="body")))
