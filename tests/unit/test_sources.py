"""Documents come out of every kind of source alike, and a wrong source is one line."""

import json
from pathlib import Path

import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Source
from xlstm_distill.data.fetch import open_hub
from xlstm_distill.data.sources import columns_of, open_source

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


def test_of_a_bounded_source_the_files_come_in_an_order_of_their_own_wherever_they_lie(tmp_path):
    orders = []
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        for number in range(10):
            (tmp_path / place / f"{number}.txt").write_text(f"text {number}", encoding="utf-8")
        orders.append(read(Source(kind="text", path=f"{tmp_path}/{place}/*.txt", tokens=100)))
    assert orders[0] == orders[1] != sorted(orders[0])
    assert sorted(orders[0]) == [f"text {number}" for number in range(10)]


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    jsonl(tmp_path / "a.jsonl", [{"body": text} for text in TEXTS])
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        opened = open_source("mine", Source(kind=kind, path=f"{tmp_path}/a.{kind}", field="body"), tmp_path)
        assert list(opened) == list(opened) == TEXTS
        assert opened.documents == 3
        assert opened.read == pytest.approx((tmp_path / f"a.{kind}").stat().st_size)


@pytest.mark.parametrize("kind", ["demo", "hub"])
def test_what_was_fetched_is_read_from_there(tmp_path, kind):
    jsonl(tmp_path / "mine.jsonl", [{"text": text} for text in TEXTS])
    assert read(Source(kind=kind, path="math"), tmp_path) == TEXTS


def test_what_should_have_been_fetched_and_is_not_there_is_named(tmp_path):
    with pytest.raises(
        Mistake, match=f"source mine: {tmp_path}/output/data/mine.jsonl is missing; remove {tmp_path}/man"
    ):
        read(Source(kind="hub", path="some/set"), tmp_path / "output" / "data")


def test_empty_documents_are_counted_and_left_out_and_do_not_count_to_the_limit(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ["", "a", None, " \n", "b", "c"]])
    documents = open_source("mine", Source(kind="jsonl", path=str(file), limit=2), tmp_path)
    assert list(documents) == ["a", "b"]
    assert (documents.documents, documents.empty) == (5, 3)


def test_messages_come_as_they_are(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": []}])
    documents = open_source("mine", Source(kind="jsonl", path=str(file), format="chat", field="messages"), tmp_path)
    assert list(documents) == [CHAT]
    assert (documents.documents, documents.empty, documents.unanswered) == (3, 1, 1)
    assert documents.roles == set()


def test_chats_without_an_answer_of_the_assistant_are_counted_apart_from_empty_ones_and_their_roles_kept(tmp_path):
    turns = lambda role: [CHAT[0], {"role": role, "content": "4"}]  # noqa: E731
    rows = [turns("gpt"), turns("assistant"), turns("Assistant"), [{"role": "gpt", "content": " "}], CHAT[:1]]
    file = jsonl(tmp_path / "a.jsonl", [{"messages": row} for row in rows])
    for parts in (1, 2):
        source = Source(kind="jsonl", path=str(file), format="chat", field="messages", parts=parts)
        first, *others = (open_source("mine", source, tmp_path, part) for part in range(parts))
        assert [list(first), *map(list, others)] == [[CHAT], *[[] for _ in others]]
        assert (first.documents, first.empty, first.unanswered) == (5, 1, 3)
        assert first.roles == {"gpt", "Assistant"}
        assert all((d.documents, d.empty, d.unanswered) == (0, 0, 0) for d in others)


@pytest.mark.parametrize(
    ("row", "empty", "unanswered"),
    [
        ({"input": "2+2?", "output": ""}, 0, 1),
        ({"input": "2+2?", "output": None}, 0, 1),
        ({"input": CHAT, "output": " "}, 0, 1),
        ({"input": "", "output": "4"}, 0, 1),
        ({"input": " ", "output": None}, 1, 0),
    ],
)
def test_a_row_without_a_question_or_an_answer_is_unanswered_and_without_either_empty(tmp_path, row, empty, unanswered):
    file = jsonl(tmp_path / "a.jsonl", [row])
    source = Source(kind="jsonl", path=str(file), format="chat", field="input", answer="output")
    documents = open_source("mine", source, tmp_path)
    assert list(documents) == []
    assert (documents.documents, documents.empty, documents.unanswered) == (1, empty, unanswered)


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
    told = {
        "jsonl": f"source mine: {tmp_path}/a, line 2: not JSON",
        "parquet": "source mine: .* cannot be read as Parq",
    }
    with pytest.raises(Mistake, match=told[kind]) as error:
        read(Source(kind=kind, path=f"{tmp_path}/a"))
    assert "\n" not in str(error.value)


def test_a_data_set_laid_out_as_on_the_hub_is_streamed_and_its_columns_checked(tmp_path):
    jsonl(tmp_path / "set" / "train.jsonl", [{"text": text} for text in TEXTS])
    source = Source(kind="hub", path=str(tmp_path / "set"))
    rows, commit = open_hub(source)
    assert [columns_of("mine", source, row)["text"] for row in rows] == TEXTS
    assert commit == ""
    with pytest.raises(Mistake, match=r"field=body: no such column in .*; there are text"):
        columns_of("mine", Source(kind="hub", path=str(tmp_path / "set"), field="body"), next(iter(rows)))


@pytest.mark.parametrize(
    ("repo", "found", "commit"),
    [("some/set", "c0ffee0" + "0" * 33, "c0ffee0" + "0" * 33), ("some/set", "auto", ""), (None, "c0ffee0" * 5, "")],
)
def test_the_commit_of_a_data_set_is_the_one_that_the_hubs_library_gives_and_no_other(monkeypatch, repo, found, commit):
    import datasets

    class Builder:
        repo_id, hash = repo, found

        def as_streaming_dataset(self, split):
            return [{"split": split}]

    asked = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: asked.append((*a, *k.values())) or Builder())
    assert open_hub(Source(kind="hub", path="some/set", split="test")) == ([{"split": "test"}], commit)
    assert asked == [("some/set", None, None)]
