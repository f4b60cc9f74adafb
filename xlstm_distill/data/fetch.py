"""Stage `fetch`: teacher, tokenizer and data sets → local folders. The one stage that needs the internet, and only for
what lies there."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xlstm_distill.contract.budget import is_bounded, text_for
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import sync, write_json
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Source
from xlstm_distill.data import demo
from xlstm_distill.data.fetch_teacher import bring_teacher
from xlstm_distill.data.sources import Row, Unanswered, columns_of, local_files, mend, text_of, to_document
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag

CHECK_EVERY = 256
"""Documents between two looks at the stop flag."""
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass
class Brought:
    """What was brought of a source."""

    documents: int = 0
    revision: str = ""
    """Commit of a data set of the hub."""
    characters: int = 0
    """Of text in them, where `tokens` bounds the source."""
    stopped_at: int = 0
    """The `tokens` for which there was enough, so that no more was brought; 0: all is there."""

    def serves(self, source: Source) -> bool:
        """Whether there is as much of it as `source` wants."""
        return not self.stopped_at or 0 < source.tokens <= self.stopped_at


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Bring everything that later stages read. Output: `teacher/`, `teacher.json`, `data/SOURCE.jsonl` and, of the
    texts of the evaluation, `evaluation/SOURCE.jsonl`.

    Returns:
        Facts: `teacher` (what `teacher.json` says), and per source that was brought `documents`; of the hub's
        `revisions`: the commit that it was; of those with a budget the `characters` of their text, and in `stopped_at`
        the budget of those that hold more.

    Raises:
        Mistake: something cannot be found, or the teacher is not the one that its YAML describes.
    """
    if world.size > 1:
        raise Mistake(f"fetch: runs as one process, got {world.size} ranks; ask for one node and no GPU")
    config = folder.config
    wanted = {"data": config.sources, "evaluation": config.eval.texts}
    sources = [(kind, *item) for kind, found in wanted.items() for item in found.items() if not config.data.shards]
    found: dict[str, Brought] = {}
    with Metrics(folder.path, total=1 + len(sources)) as metrics:
        facts = bring_teacher(config.teacher, folder.output)
        metrics.log(1)
        for step, (kind, name, source) in enumerate(sources, start=2):
            stop.check()
            if brought := bring_source(name, source, folder.output / kind / f"{name}.jsonl", stop.check):
                found[name] = brought
            metrics.log(step)
    documents = {name: brought.documents for name, brought in found.items()}
    return {
        "teacher": facts,
        "documents": documents,
        "revisions": {name: brought.revision for name, brought in found.items() if brought.revision},
        "characters": {name: brought.characters for name, brought in found.items() if brought.characters},
        "stopped_at": {name: brought.stopped_at for name, brought in found.items() if brought.stopped_at},
    }


def bring_source(name: str, source: Source, target: Path, check: Callable[[], None] = lambda: None) -> Brought | None:
    """Write a generated or downloaded source to `target`, one JSON document per line; look whether local files exist.

    Args:
        name: of the source, for messages.
        source: its settings.
        target: file to write; kept when it is there already (it is written whole or not at all) and holds enough.
        check: called now and then; may raise to stop.

    Returns:
        What is there now; None for a source that is read where it lies.
    """
    if source.kind not in ("demo", "hub"):
        local_files(name, source)
        return None
    note = target.with_name(f".{target.stem}.brought.json")  # hidden: the same rows are the same input
    if target.exists() and note.exists():
        brought = Brought(**json.loads(note.read_text(encoding="utf-8")))
        if brought.serves(source):
            return brought
    brought = Brought()
    lines: Iterator[bytes]
    if source.kind == "demo":
        lines = (json_line({source.field: text}) for text in demo.documents(source.path, source.limit))
    else:
        with mend(name, source):
            rows, brought.revision = open_hub(source)
        lines = _lines(name, source, rows, brought)
    brought.documents = write_jsonl(target, lines, check)
    write_json(note, asdict(brought))
    if source.kind == "hub" and is_bounded(source):
        _tell(name, source, brought)
    return brought


def _tell(name: str, source: Source, brought: Brought) -> None:
    """How much text there is now for the tokens that are wanted."""
    documents = f"{brought.documents} documents with {brought.characters} characters"
    if brought.stopped_at:
        told = f"brought {documents}, as many as {source.tokens} tokens may take; the data set holds more"
    else:
        told = f"brought all its {documents}; {source.tokens} tokens may take {text_for(source.tokens)}"
    print(f"source {name}: {told}", flush=True)


def open_hub(source: Source) -> tuple[Iterable[Row], str]:
    """Rows of a data set of the hub, or of a folder laid out like one; and the commit, where it has one.

    Where only so many tokens are wanted, its files come in an order of their own, several side by side: the first ones
    are often of one kind.
    """
    from datasets import load_dataset_builder

    builder = load_dataset_builder(source.path, source.subset or None, revision=source.revision or None)
    commit = str(builder.hash) if builder.repo_id and COMMIT.fullmatch(str(builder.hash)) else ""
    rows = builder.as_streaming_dataset(split=source.split)
    return rows.shuffle(seed=0) if is_bounded(source) else rows, commit


def _lines(name: str, source: Source, rows: Iterable[Row], brought: Brought) -> Iterator[bytes]:
    """The rows as lines of JSON, up to `limit` or to enough text for `tokens`, of which `brought` keeps count."""
    with mend(name, source):
        for count, row in enumerate(rows):
            if source.limit and count >= source.limit:
                return
            place = f"row {count + 1} of {source.path}"
            try:
                yield json_line(columns_of(name, source, row))
            except (UnicodeEncodeError, TypeError) as error:
                raise Mistake(f"{place} cannot be written as JSON ({error})") from error
            if is_bounded(source):
                document = to_document(name, source, row, place)
                brought.characters += 0 if isinstance(document, Unanswered) else len(text_of(document))
                if brought.characters >= text_for(source.tokens):
                    brought.stopped_at = source.tokens
                    return


def json_line(row: Row) -> bytes:
    """A row as a line of JSON.

    Raises:
        TypeError: it holds something that JSON does not know.
        UnicodeEncodeError: it holds half of a surrogate pair.
    """
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def write_jsonl(target: Path, lines: Iterable[bytes], check: Callable[[], None] = lambda: None) -> int:
    """Write `lines` to `target`, whole or not at all, and return their number."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.tmp")
    count = 0
    with beside.open("wb") as file:
        for count, line in enumerate(lines, start=1):
            file.write(line)
            if count % CHECK_EVERY == 0:
                check()
        file.flush()
        os.fsync(file.fileno())
    beside.replace(target)
    sync(target.parent)
    return count
