"""Stage `tokenize`: documents → token shards, packed to samples of T + 1 tokens, with a held-out split."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Data
from xlstm_distill.data.encode import Encoded, encode_documents
from xlstm_distill.data.shards import import_streaming, sample, shard_writer
from xlstm_distill.data.sources import Documents, open_source
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag

SPLITS = ("train", "validation")


class Writer(Protocol):
    """What takes samples."""

    def write(self, sample: dict[str, Any]) -> None: ...


class Packer:
    """One stream of documents → samples of T + 1 tokens that overlap by one, so that each token is predicted once.

    Sample i holds the tokens iT … iT + T. Nothing is dropped in between; what is left at the end is `remainder`.

    Args:
        writer: takes the samples.
        sequence: T.
    """

    def __init__(self, writer: Writer, sequence: int) -> None:
        self.writer, self.sequence = writer, sequence
        self.documents = self.tokens = self.samples = 0
        self._parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        self._pending = 0

    def add(self, document: Encoded) -> None:
        """Append a document."""
        count = len(document.tokens)
        self._parts.append((document.tokens, document.mask, np.full(count, self.documents, np.int32)))
        self._pending += count
        self.tokens += count
        self.documents += 1
        if self._pending > self.sequence:
            self._write()

    def _write(self) -> None:
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        start = 0
        for start in range(0, self._pending - self.sequence, self.sequence):
            self.writer.write(sample(*(c[start : start + self.sequence + 1] for c in columns)))
            self.samples += 1
        kept = start + self.sequence
        self._parts = [(columns[0][kept:], columns[1][kept:], columns[2][kept:])]
        self._pending -= kept

    @property
    def remainder(self) -> int:
        """Tokens at the end that no sample predicts (yet)."""
        return max(0, self.tokens - 1 - self.samples * self.sequence)

    def facts(self) -> dict[str, int]:
        """What was counted."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "samples": self.samples,
            "remainder": self.remainder,
        }


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Tokenise this element's sources that are not done yet. Output: `SOURCE/train`, `SOURCE/validation`.

    Each source is a piece with its own manifest; its facts count documents, tokens, samples and the remainder per
    split, and empty documents.

    Raises:
        Mistake: a source cannot be read, or is too small to give both splits a sample.
        Stopped: a stop was requested; finished sources are durable.
    """
    if world.size > 1:
        raise Mistake(f"tokenize: runs as one process per array element, got {world.size} ranks; ask for no GPU")
    import_streaming()
    config, fetched = folder.config, folder.input("fetch")
    pieces = folder.my_pieces(world)
    sources = {name: open_source(name, config.sources[name], fetched) for name in pieces}
    total = sum(source.expected() for source in sources.values())
    with Metrics(folder.path, total) as metrics:
        before = 0

        def on_chunk(seen: int) -> None:
            metrics.log(min(before + seen, total))
            stop.check()

        for name, documents in sources.items():
            with folder_atomic(folder.output / name) as target:
                facts = tokenize_source(documents, fetched / "teacher", target, config.data, on_chunk)
            folder.finish(facts, name)
            before += documents.expected()
            metrics.log(before, {f"tokens/{name}": sum(facts[split]["tokens"] for split in SPLITS)})
    return {}


def tokenize_source(
    documents: Documents,
    teacher: Path,
    target: Path,
    settings: Data,
    on_chunk: Callable[[int], None] = lambda seen: None,
) -> dict[str, Any]:
    """Write one source's shards below `target`.

    Args:
        documents: of the source.
        teacher: HF folder with the tokenizer.
        target: gets `train/` and `validation/`.
        settings: sequence, share of the validation, size of shards, workers.
        on_chunk: hears the number of documents so far; may raise to stop.

    Returns:
        Facts: per split documents, tokens, samples, remainder; `empty`: documents without text.

    Raises:
        Mistake: a split has no sample.
    """
    name, workers = documents.name, settings.workers or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        packers = {}
        for split in SPLITS:
            writer = stack.enter_context(shard_writer(target / split, settings.sequence, settings.shard_bytes))
            packers[split] = Packer(writer, settings.sequence)
        chunks = encode_documents(documents, teacher, documents.source.format, workers)
        seen = 0
        for chunk in chunks:
            for document in chunk:
                packers["validation" if document.draw < settings.validation else "train"].add(document)
            seen += len(chunk)
            on_chunk(seen)
        facts: dict[str, Any] = {split: packer.facts() for split, packer in packers.items()}
        _check_not_empty(name, facts, settings)
    return {**facts, "empty": documents.empty}


def _check_not_empty(name: str, facts: dict[str, Any], settings: Data) -> None:
    for split in SPLITS:
        counts = facts[split]
        if counts["samples"]:
            continue
        advice = f"raise data.validation={settings.validation}, " if split == "validation" else ""
        total = sum(facts[s]["documents"] for s in SPLITS)
        raise Mistake(
            f"source {name}: its {split} split has {counts['documents']} of {total} documents and {counts['tokens']} "
            f"tokens, less than one sample of {settings.sequence + 1}; {advice}give more text or lower data.sequence"
        )
