"""Encoded documents → samples of T + 1 tokens, and where a source ends of which only so many tokens are wanted."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.contract.budget import is_bounded, share_of
from xlstm_distill.data.encode import Encoded
from xlstm_distill.data.shards import sample
from xlstm_distill.data.sources import Documents


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
        """Append a document, or a passage of one."""
        count = len(document.tokens)
        self._parts.append((document.tokens, document.mask, np.full(count, self.documents, np.int32)))
        self._pending += count
        self.tokens += count
        self.documents += document.last
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
        return max(0, self._pending - 1)

    def facts(self) -> dict[str, int]:
        """What was counted."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "samples": self.samples,
            "remainder": self.remainder,
        }


class Budget:
    """The end of a source of which only so many tokens are wanted.

    It ends before the first document that begins when there are as many, and not before each split has a sample. So it
    depends on the documents alone. Some were read ahead then: these are left out.
    """

    def __init__(self, documents: Documents, packers: Mapping[str, Packer]) -> None:
        self.documents, self.packers = documents, packers.values()
        self.tokens = share_of(documents.source) if is_bounded(documents.source) else 0
        """Of this piece; 0: all."""
        self.beyond = 0
        """Documents that were read and are not wanted."""

    @property
    def found(self) -> int:
        return sum(packer.tokens for packer in self.packers)

    def ends_before(self, document: Encoded) -> bool:
        """Whether a document, or passage of one, is not wanted any more; then no more are read."""
        if self.tokens and document.first and self.found >= self.tokens:
            self.documents.enough |= all(packer.samples for packer in self.packers)
        self.beyond += self.documents.enough and document.first
        return self.documents.enough

    def tell(self) -> None:
        """Say so where there are not as many."""
        name, part = self.documents.name, self.documents.part
        if self.found < self.tokens:
            piece = f"{name}/{part}" if self.documents.source.parts > 1 else name
            print(
                f"source {piece}: {self.found} tokens, fewer than the {self.tokens} that are wanted of it; its text "
                f"ends there, so the trainings see it more often",
                flush=True,
            )
