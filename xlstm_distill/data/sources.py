"""A data source → its documents: local files, what `fetch` brought as JSONL, and rows of data sets of the hub."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from xlstm_distill.contract.budget import is_bounded
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Source
from xlstm_distill.data.chat import TOOLS, Chat, as_messages, as_tools, said, says_something, strings
from xlstm_distill.data.records import PASSAGE, Progress, Row, cut, json_records, parquet_records, text_passages

USUAL = {"system", "user", "assistant", "tool"}
"""Roles that are named to nobody."""
ROUND = 1 << 20
"""Progress counts in MiB."""


@dataclass(frozen=True)
class Passage:
    """A part of a text that is too long to be handled whole. Its parts follow one another."""

    text: str
    first: bool
    last: bool


class Unanswered(Chat):
    """A chat in which the assistant says nothing, or of a row without a question or an answer."""


Document = str | Chat | Passage
"""Plain text, the messages of a chat, or a part of a long text."""


def starts(document: Document) -> bool:
    """Whether a document begins here: false for the later passages of a long one."""
    return document.first if isinstance(document, Passage) else True


def text_of(document: Document) -> str:
    """What a document says: of a chat all its turns, calls of tools included."""
    if isinstance(document, Passage):
        return document.text
    return document if isinstance(document, str) else "\n".join(map(said, document))


@dataclass
class Documents:
    """The documents of one source, in order."""

    name: str
    source: Source
    files: list[str]
    part: int = 0
    """Of `source.parts`: the others' documents are passed over."""
    unanswered_too: bool = False
    """Whether to give the chats that have no answer."""
    documents: int = 0
    """How many the last iteration read; what it left out is counted by part 0 for all."""
    empty: int = 0
    """How many of them it left out because there was no text in them."""
    unanswered: int = 0
    """How many of them it left out as `Unanswered`."""
    roles: set[str] = field(default_factory=set)
    """Roles in those, apart from the usual ones."""
    read: float = 0.0
    """Bytes of the files that it has read."""
    enough: bool = False
    """Set by whoever takes the documents: no more are wanted."""

    def __iter__(self) -> Iterator[Document]:
        self.documents, self.empty, self.unanswered, self.read = 0, 0, 0, 0.0
        self.roles, self.enough = set(), False
        seen = 0
        with mend(self.name, self.source):
            for passages in self._every():
                if self.source.limit and seen >= self.source.limit:
                    return
                for document in passages:
                    if self.enough:
                        return
                    if self._left_out(document):
                        self.documents += self.part == 0
                        continue
                    seen += starts(document)
                    if (seen - 1) % self.source.parts == self.part:
                        self.documents += starts(document)
                        yield document

    def _left_out(self, document: Document) -> bool:
        """Whether there is nothing in a document to learn from; counted."""
        if not document:
            self.empty += self.part == 0
        elif isinstance(document, Unanswered) and not self.unanswered_too:
            self.unanswered += self.part == 0
            self.roles |= {str(m["role"]) for m in document} - USUAL
        else:
            return False
        return True

    def _every(self) -> Iterator[Iterator[Document]]:
        """One document after the other, each as its passages."""

        def progress(read: float) -> None:
            self.read += read

        for file in self.files:
            if self.source.kind == "text":
                yield _whole_or_passages(text_passages(file, progress))
                continue
            for place, row in _records(self.source, file, progress):
                document = to_document(self.name, self.source, row, place)
                yield _split(document) if isinstance(document, str) else iter([document])

    def expected(self) -> int:
        """MiB of the files, rounded up, for a progress bar."""
        return -(-sum(map(os.path.getsize, self.files)) // ROUND)

    @property
    def done(self) -> int:
        """MiB of the files that were read."""
        return int(self.read // ROUND)


def _records(source: Source, file: str, progress: Progress) -> Iterator[tuple[str, Row]]:
    if source.kind == "parquet":
        columns = [column for column in (source.field, source.answer) if column]
        return parquet_records(file, columns, progress, [TOOLS] if source.format == "chat" else [])
    return json_records(file, progress)


def _split(text: str) -> Iterator[Document]:
    """A text, in passages where it is long."""

    def pieces() -> Iterator[str]:
        rest = text
        while len(rest) > PASSAGE:
            end = cut(rest, PASSAGE)
            yield rest[:end]
            rest = rest[end:]
        yield rest

    return iter([text]) if len(text) <= PASSAGE else _whole_or_passages(pieces())


def _whole_or_passages(texts: Iterator[str]) -> Iterator[Document]:
    """The texts of one document: itself where it is one text, empty where that is blank, else passages."""
    before = next(texts)
    if (following := next(texts, None)) is None:
        yield before if before.strip() else ""
        return
    yield Passage(before, first=True, last=False)
    while following is not None:
        before, following = following, next(texts, None)
        yield Passage(before, first=False, last=following is None)


def open_source(name: str, source: Source, fetched: Path, part: int = 0) -> Documents:
    """The documents of a source.

    Args:
        name: of the source, for messages.
        source: its settings.
        fetched: folder of the fetch job's output that has `NAME.jsonl` for generated and downloaded sources.
        part: of `source.parts`.

    Where only so many tokens are wanted, local files come in an order of their own: the first ones are often of one
    kind.

    Raises:
        Mistake: its files are not there.
    """
    if source.kind in ("demo", "hub"):
        file = fetched / f"{name}.jsonl"
        if not file.is_file():
            job = fetched.parent.parent
            raise Mistake(f"source {name}: {file} is missing; remove {job}/manifest.json and launch again")
        return Documents(name, source, [str(file)], part)
    files = local_files(name, source)
    if is_bounded(source):
        files.sort(key=lambda file: xxhash.xxh64_intdigest(os.path.basename(file).encode()))
    return Documents(name, source, files, part)


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


def columns_of(name: str, source: Source, row: Row) -> dict[str, Any]:
    """The columns of a row that the settings name; of a chat also `tools`, where it is there.

    Raises:
        Mistake: it does not have one of them.
    """
    wanted = [column for column in (source.field, source.answer) if column]
    for column in wanted:
        if column not in row:
            raise _no_column(name, source, column, row)
    tools = [TOOLS] if source.format == "chat" and TOOLS in row else []
    return {column: row[column] for column in wanted + tools}


@contextmanager
def mend(name: str, source: Source) -> Iterator[None]:
    """Say of which source it is that something cannot be read, in one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except Mistake as error:
        told = str(error)
        raise error if told.startswith("source ") else Mistake(f"source {name}: {told}") from error
    except (DatasetsError, OSError, ValueError, EOFError) as error:
        cause = error.__cause__ if str(error.__cause__ or "") else error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise Mistake(f"source {name}: path={source.path} cannot be read as {source.kind} ({reason})") from error


def _no_column(name: str, source: Source, column: str, row: Row) -> Mistake:
    key = "answer" if column == source.answer and column != source.field else "field"
    return Mistake(f"source {name}: {key}={column}: no such column in {source.path}; there are {', '.join(row)}")


def to_document(name: str, source: Source, row: Row, place: str) -> str | Chat:
    """The document in one row: text (with `format=chat` messages), empty where there is nothing.

    Raises:
        Mistake: a column is missing, or holds something else; `place` tells where the row is.
    """
    columns_of(name, source, row)
    document: str | Chat
    if source.format == "chat":
        document = _messages(source, row, place)
    else:
        text = row[source.field]
        if text is not None and not isinstance(text, str):
            raise Mistake(
                f"{place}: field={source.field} holds {type(text).__name__}, not text; set format=chat for messages"
            )
        document = text if text and text.strip() else ""
    try:
        "\n".join(strings([document, document.tools] if isinstance(document, Chat) else document)).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise Mistake(f"{place}: holds half of a surrogate pair ({half}), which is no text; mend or drop it") from error
    return document


def _messages(source: Source, row: Row, place: str) -> Chat:
    messages, complete = as_messages(place, source.field, row[source.field], "user"), True
    if source.answer:
        answer = as_messages(place, source.answer, row[source.answer], "assistant")
        messages, complete = messages + answer, bool(messages and answer)
    speaking = {m["role"] for m in messages if says_something(m)}
    if not speaking:
        return Chat()
    chat = Chat(messages) if complete and "assistant" in speaking else Unanswered(messages)
    chat.tools = as_tools(place, row.get(TOOLS))
    return chat
