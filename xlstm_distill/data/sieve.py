"""Documents of a source that share text with the evaluation: counted, and left out if asked for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xlstm_distill.contract.schema import Config
from xlstm_distill.data.overlap import Overlap, last_words
from xlstm_distill.data.sources import Document, Passage, open_source, starts, text_of


@dataclass
class Sieve:
    """Documents that share 13 words in a row with a text of the evaluation: counted, and left out if asked for.

    Of a long document only the passages are left out that share something.
    """

    overlap: Overlap
    drop: bool
    counts: dict[str, int] = field(default_factory=dict)
    """Documents by evaluation set."""
    documents: int = 0
    """Documents that share something with any set."""
    dropped: int = 0
    """Documents that were left out."""
    passages: int = 0
    """Passages of long documents that were left out."""

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that stay; the counts begin anew."""
        self.counts = dict.fromkeys(self.overlap.names, 0)
        self.documents = self.dropped = self.passages = 0
        known: set[str] = set()
        before = ""
        for document in documents:
            known, before = (set(), "") if starts(document) else (known, before)
            text = before + text_of(document)
            found = self.overlap(text)
            before = last_words(text) if isinstance(document, Passage) and not document.last else ""
            for name in set(found) - known:
                self.counts[name] += 1
            self.documents += bool(found and not known)
            known |= set(found)
            if not (found and self.drop):
                yield document
            elif isinstance(document, Passage):
                self.passages += 1
                before = ""
                yield Passage("", document.first, document.last)
            else:
                self.dropped += 1

    def facts(self) -> dict[str, Any]:
        """What was counted."""
        return {"overlap": {"documents": self.documents, "passages_dropped": self.passages, "sets": self.counts}}


def make_sieve(config: Config, fetched: Path) -> Sieve | None:
    """The check against the texts of the evaluation (`eval.texts`); None where none are given.

    Args:
        config: `eval.texts` and `data.overlap`.
        fetched: has `NAME.jsonl` of the sets that were downloaded.
    """
    if not config.eval.texts:
        return None
    opened = {name: open_source(name, source, fetched) for name, source in config.eval.texts.items()}
    overlap = Overlap({name: map(text_of, replace(texts, unanswered_too=True)) for name, texts in opened.items()})
    if overlap.short:
        print(f"eval.texts: {overlap.short} texts are too short to be looked for in the training data", flush=True)
    return Sieve(overlap, config.data.overlap == "drop")
