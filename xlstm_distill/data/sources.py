"""A data source → its documents, through `datasets`: text files, JSONL, Parquet, and what `fetch` brought as JSONL."""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Source

Message = Mapping[str, str]
Document = str | list[Message]
"""Plain text, or the messages of a chat."""
BUILDERS = {"text": "text", "jsonl": "json", "parquet": "parquet", "demo": "json", "hub": "json"}


@dataclass
class Documents:
    """The documents of one source, in order. `empty` counts those without text that an iteration left out."""

    name: str
    source: Source
    files: list[str]
    empty: int = 0

    def __iter__(self) -> Iterator[Document]:
        self.empty, count = 0, 0
        with mend(self.name, self.source):
            rows = _load(self.source, self.files)
            for row in rows:
                if self.source.limit and count >= self.source.limit:
                    return
                document = to_document(self.name, self.source, row)
                if not document:
                    self.empty += 1
                    continue
                count += 1
                yield document

    def expected(self) -> int:
        """How many there are about, for a progress bar: lines of JSONL, rows of Parquet, text files."""
        if self.source.kind == "parquet":
            from pyarrow.parquet import read_metadata

            with mend(self.name, self.source):
                count = sum(read_metadata(file).num_rows for file in self.files)
        elif self.source.kind == "text":
            count = len(self.files)
        else:
            count = sum(_lines(file) for file in self.files)
        return min(count, self.source.limit) if self.source.limit else count


def _lines(file: str) -> int:
    with open(file, "rb") as opened:
        return sum(block.count(b"\n") for block in iter(lambda: opened.read(1 << 20), b""))


def open_source(name: str, source: Source, fetched: Path) -> Documents:
    """The documents of a source.

    Args:
        name: of the source, for messages.
        source: its settings.
        fetched: `output/` of the fetch job, which has `data/NAME.jsonl` for generated and downloaded sources.

    Raises:
        Mistake: its files are not there.
    """
    if source.kind in ("demo", "hub"):
        file = fetched / "data" / f"{name}.jsonl"
        if not file.is_file():
            raise Mistake(f"source {name}: {file} is missing; remove {fetched.parent}/manifest.json and launch again")
        return Documents(name, source, [str(file)])
    return Documents(name, source, local_files(name, source))


def local_files(name: str, source: Source) -> list[str]:
    """The files that a local source's glob names, sorted.

    Raises:
        Mistake: there are none.
    """
    found = sorted(f for f in glob.glob(os.path.expanduser(source.path), recursive=True) if os.path.isfile(f))
    if not found:
        hint = "; it is a folder: add /*" if os.path.isdir(os.path.expanduser(source.path)) else ""
        raise Mistake(f"source {name}: no file matches path={source.path} (from {os.getcwd()}){hint}")
    return [os.path.abspath(file) for file in found]


def _load(source: Source, files: list[str]) -> Iterable[Mapping[str, Any]]:
    """Rows of local files. Streaming, because otherwise `datasets` first copies everything into its cache."""
    from datasets import load_dataset

    options = {"sample_by": "document"} if source.kind == "text" else {}
    return load_dataset(BUILDERS[source.kind], data_files=files, split="train", streaming=True, **options)


def stream_hub(name: str, source: Source) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set of the hub, or of a folder laid out like one."""
    from datasets import load_dataset

    rows = load_dataset(
        source.path, source.subset or None, split=source.split, revision=source.revision or None, streaming=True
    )
    for row in rows:
        for column in filter(None, (source.field, source.answer)):
            if column not in row:
                raise _no_column(name, source, column, row)
        yield row


@contextmanager
def mend(name: str, source: Source) -> Iterator[None]:
    """Turn what `datasets` raises for wrong names and broken files into one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, EOFError) as error:
        cause = error.__cause__ if str(error.__cause__ or "") else error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise Mistake(f"source {name}: path={source.path} cannot be read as {source.kind} ({reason})") from error


def _no_column(name: str, source: Source, column: str, row: Mapping[str, Any]) -> Mistake:
    key = "answer" if column == source.answer and column != source.field else "field"
    return Mistake(f"source {name}: {key}={column}: no such column in {source.path}; there are {', '.join(row)}")


def to_document(name: str, source: Source, row: Mapping[str, Any]) -> Document:
    """The document in one row: text (with `format=chat` messages), empty where there is nothing.

    Raises:
        Mistake: a column is missing, or holds something else.
    """
    field = "text" if source.kind == "text" else source.field
    for column in (field, source.answer):
        if column and column not in row:
            raise _no_column(name, source, column, row)
    if source.format == "chat":
        return _messages(name, source, row)
    text = row[field]
    if text is None or isinstance(text, str):
        return text if text and text.strip() else ""
    raise Mistake(f"source {name}: field={field} holds {type(text).__name__}, not text; set format=chat for messages")


def _messages(name: str, source: Source, row: Mapping[str, Any]) -> list[Message]:
    messages = _as_messages(name, source.field, row[source.field], "user")
    if source.answer:
        answer = _as_messages(name, source.answer, row[source.answer], "assistant")
        messages = messages + answer if messages and answer else []
    return messages if any(m["role"] == "assistant" and m["content"].strip() for m in messages) else []


def _as_messages(name: str, column: str, value: Any, role: str) -> list[Message]:
    """Text as one message of `role`; messages as they are."""
    if value is None or isinstance(value, str):
        return [{"role": role, "content": value}] if value and value.strip() else []
    if isinstance(value, Mapping):
        value = [value]
    try:
        return [{"role": str(m["role"]), "content": str(m["content"] or "")} for m in value]
    except (TypeError, KeyError) as error:
        raise Mistake(
            f"source {name}: column {column} holds no chat; expected a list of messages with role and content"
        ) from error
