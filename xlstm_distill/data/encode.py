"""Documents → tokens and loss masks, on several processes; the result does not depend on how many."""

import itertools
import json
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.data.chat import encode_chat
from xlstm_distill.data.sources import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 256, 1 << 18
"""A task for a process: so many documents, or as many as hold so many characters."""
ALONE = 16
"""Chunks that are done before other processes are started: starting them takes longer than a small corpus."""


@dataclass(frozen=True)
class Encoded:
    """One document."""

    tokens: NDArray[np.int32]
    """[n], the separator included."""
    mask: NDArray[np.uint8]
    """[n]; 1: counts as a label."""
    draw: float
    """In [0, 1), from the hash of the text: below `data.validation` it is held out."""


class Encoder:
    """A tokenizer with its policy for one format.

    Args:
        folder: HF folder of the tokenizer.
        form: `text`: the tokenizer's own special tokens, then EOS as a separator; every token counts. `chat`: the chat
            template; the assistant's tokens count.

    Raises:
        Mistake: the tokenizer has no EOS token or no chat template.
    """

    def __init__(self, folder: Path, form: Literal["text", "chat"]) -> None:
        self.tokenizer, self.form = load_tokenizer(folder), form
        if form == "text" and self.tokenizer.eos_token_id is None:
            raise Mistake(f"{folder}: the tokenizer has no EOS token to stand between documents; set one in its files")
        if form == "chat" and not self.tokenizer.chat_template:
            raise Mistake(f"{folder}: the tokenizer has no chat template; set format=text for sources of plain text")

    def __call__(self, documents: Sequence[Document]) -> list[Encoded]:
        """Encode some documents.

        Raises:
            Mistake: a chat does not fit the template.
        """
        if self.form == "chat":
            pairs = [encode_chat(self.tokenizer, document) for document in documents if not isinstance(document, str)]
        else:
            eos = self.tokenizer.eos_token_id
            rows = self.tokenizer(list(documents), return_attention_mask=False)["input_ids"]
            ended = [row if row and row[-1] == eos else [*row, eos] for row in rows]
            pairs = [(row, [1] * len(row)) for row in ended]
        return [
            Encoded(np.array(tokens, np.int32), np.array(mask, np.uint8), draw(document))
            for (tokens, mask), document in zip(pairs, documents, strict=True)
        ]


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`, without a word about long documents."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 1 << 62
    return tokenizer


def draw(document: Document) -> float:
    """A number in [0, 1) that depends on the document's text alone: equal documents stay on one side."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True, ensure_ascii=False)
    return (xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass")) >> 32) / 2**32


def encode_documents(
    documents: Iterable[Document], folder: Path, form: Literal["text", "chat"], workers: int
) -> Iterator[list[Encoded]]:
    """Encode documents in order, chunk by chunk.

    Args:
        documents: all of them; read as far as the processes can follow.
        folder: HF folder of the tokenizer.
        form: see `Encoder`.
        workers: processes; 1: this one.

    Raises:
        Mistake: see `Encoder`.
    """
    chunks, encoder = _chunks(documents), Encoder(folder, form)
    yield from map(encoder, itertools.islice(chunks, ALONE) if workers > 1 else chunks)
    first = next(chunks, None)
    if first is None:
        return
    # Spawned, not forked: this process runs threads (Arrow's, the tokenizer's), which a fork would leave half dead.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(folder, form))
    try:
        running: deque[Future[list[Encoded]]] = deque()
        for chunk in itertools.chain([first], chunks):
            running.append(pool.submit(_work, chunk))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
        if len(chunk) == CHUNK_DOCUMENTS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_encoder: Encoder | None = None
"""A worker's own."""


def _start_worker(folder: Path, form: Literal["text", "chat"]) -> None:
    global _encoder
    _encoder = Encoder(folder, form)


def _work(chunk: list[Document]) -> list[Encoded]:
    if _encoder is None:
        raise RuntimeError("the worker was not started by _start_worker")
    return _encoder(chunk)
