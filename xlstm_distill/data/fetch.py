"""Stage `fetch`: teacher, tokenizer and data sets → local folders. The one stage that needs the internet, and only for
what lies there."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import sync
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Source
from xlstm_distill.data import demo
from xlstm_distill.data.fetch_teacher import bring_teacher
from xlstm_distill.data.sources import local_files, mend, stream_hub
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag

CHECK_EVERY = 256
"""Documents between two looks at the stop flag."""


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Bring everything that later stages read. Output: `teacher/`, `teacher.json`, `data/SOURCE.jsonl`.

    Returns:
        Facts: `teacher` (what `teacher.json` says), `documents` per source that was brought.

    Raises:
        Mistake: something cannot be found, or the teacher is not the one that its YAML describes.
    """
    if world.size > 1:
        raise Mistake(f"fetch: runs as one process, got {world.size} ranks; ask for one node and no GPU")
    sources = {} if folder.config.data.shards else folder.config.sources
    documents = {}
    with Metrics(folder.path, total=1 + len(sources)) as metrics:
        facts = bring_teacher(folder.config.teacher, folder.output)
        metrics.log(1)
        for step, (name, source) in enumerate(sources.items(), start=2):
            stop.check()
            count = bring_source(name, source, folder.output / "data" / f"{name}.jsonl", stop.check)
            if count is not None:
                documents[name] = count
            metrics.log(step)
    return {"teacher": facts, "documents": documents}


def bring_source(name: str, source: Source, target: Path, check: Callable[[], None] = lambda: None) -> int | None:
    """Write a generated or downloaded source to `target`, one JSON document per line; look whether local files exist.

    Args:
        name: of the source, for messages.
        source: its settings.
        target: file to write; kept when it is there already (it is written whole or not at all).
        check: called now and then; may raise to stop.

    Returns:
        Documents written; None for a source that is read where it lies.
    """
    if source.kind not in ("demo", "hub"):
        local_files(name, source)
        return None
    if target.exists():
        with target.open("rb") as file:
            return sum(1 for _ in file)
    return write_jsonl(target, _rows(name, source), check)


def _rows(name: str, source: Source) -> Iterator[dict[str, Any]]:
    if source.kind == "demo":
        yield from ({source.field: text} for text in demo.documents(source.path, source.limit))
        return
    columns = [column for column in (source.field, source.answer) if column]
    with mend(name, source):
        for count, row in enumerate(stream_hub(name, source)):
            if source.limit and count >= source.limit:
                return
            yield {column: row[column] for column in columns}


def write_jsonl(target: Path, rows: Iterable[dict[str, Any]], check: Callable[[], None] = lambda: None) -> int:
    """Write `rows` to `target`, whole or not at all, and return their number."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.tmp")
    count = 0
    with beside.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, start=1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if count % CHECK_EVERY == 0:
                check()
        file.flush()
        os.fsync(file.fileno())
    beside.replace(target)
    sync(target.parent)
    return count
