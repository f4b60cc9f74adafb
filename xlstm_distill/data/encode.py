"""Documents → tokens and loss masks, by the threads of `tokenizers`; the result does not depend on how many they are.

RAYON_NUM_THREADS says how many; without it there is one per core that this process may use.
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.data.chat import Chat, Span, render_chat
from xlstm_distill.data.sources import Document, Passage, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 2048, 1 << 21
"""Documents that are encoded together: so many, or as many as hold so many characters."""
AHEAD = 2
"""Chunks under way while another is packed and written: one is encoded, one turned into arrays."""
LONGEST_CHAT = 1 << 24
"""Characters of a chat under its template. It cannot be handled in parts, and takes some hundred bytes per token."""


@dataclass(frozen=True)
class Encoded:
    """One document, or a passage of a long one."""

    tokens: NDArray[np.int32]
    """[n], the separator included."""
    mask: NDArray[np.uint8]
    """[n]; 1: counts as a label."""
    draw: float
    """In [0, 1), from the hash of the text: below `data.validation` it is held out. A document goes by its first
    passage."""
    first: bool = True
    """Whether a document begins here."""
    last: bool = True
    """Whether it ends here."""


class Encoder:
    """A tokenizer with its policy for one format.

    Args:
        folder: HF folder of the tokenizer.
        form: `text`: the tokenizer's own special tokens, then EOS as a separator; every token counts. `chat`: the chat
            template; the assistant's tokens count. Nothing is ever truncated.

    Raises:
        Mistake: the tokenizer is no fast one, or has no EOS token or no chat template.
    """

    def __init__(self, folder: Path, form: Literal["text", "chat"]) -> None:
        self.tokenizer, self.form = load_tokenizer(folder), form
        if not self.tokenizer.is_fast:
            raise Mistake(f"{folder}: not a fast tokenizer; convert it to a tokenizer.json")
        if form == "text" and self.tokenizer.eos_token_id is None:
            raise Mistake(f"{folder}: the tokenizer has no EOS token to stand between documents; set one in its files")
        if form == "chat" and not self.tokenizer.chat_template:
            raise Mistake(f"{folder}: the tokenizer has no chat template; set format=text for sources of plain text")
        self.backend = self.tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = self.tokenizer.split_special_tokens
        self.prefix, self.suffix = self._frame()

    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and behind a text."""
        encoded = self.backend.encode("a")
        inner = [place for place, special in enumerate(encoded.special_tokens_mask) if not special] or [0]
        return encoded.ids[: inner[0]], encoded.ids[inner[-1] + 1 :]

    def __call__(self, documents: Sequence[Document]) -> list[Encoded]:
        """Encode some documents.

        Raises:
            Mistake: a chat does not fit the template, or is too long.
        """
        if self.form == "chat":
            return self._chats([document for document in documents if isinstance(document, Chat)])
        rows: dict[bool, Iterator[list[int]]] = {}
        for whole in (True, False):
            texts = [text_of(document) for document in documents if isinstance(document, str) == whole]
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=whole)
            rows[whole] = (row.ids for row in encoded)
        return [self._text(document, next(rows[isinstance(document, str)])) for document in documents]

    def _text(self, document: Document, row: list[int]) -> Encoded:
        """A text's tokens with what stands before and behind it."""
        first = last = True
        if isinstance(document, Passage):
            first, last = document.first, document.last
            row = [*(self.prefix if first else []), *row, *(self.suffix if last else [])]
        if last and row[-1:] != [self.tokenizer.eos_token_id]:
            row.append(self.tokenizer.eos_token_id)
        return Encoded(np.array(row, np.int32), np.ones(len(row), np.uint8), draw(document), first, last)

    def _chats(self, chats: Sequence[Chat]) -> list[Encoded]:
        rendered = [render_chat(self.tokenizer, chat) for chat in chats]
        if (longest := max((len(text) for text, _ in rendered), default=0)) > LONGEST_CHAT:
            raise Mistake(f"format=chat: a chat of {longest} characters; at most {LONGEST_CHAT}, leave it out")
        encoded = self.backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            Encoded(np.array(row.ids, np.int32), loss_mask(row.offsets, spans), draw(chat))
            for row, (_, spans), chat in zip(encoded, rendered, chats, strict=True)
        ]


def loss_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.uint8]:
    """[n]: 1 for the tokens that begin inside one of the `spans`, by the characters [n] that they cover."""
    begins = np.fromiter((start for start, _ in offsets), np.int64, len(offsets))
    mask = np.zeros(len(offsets), np.uint8)
    for start, end in spans:
        mask |= (begins >= start) & (begins < end)
    return mask


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`, without a word about long documents."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 1 << 62
    return tokenizer


def draw(document: Document) -> float:
    """A number in [0, 1) that depends on the document's text alone: equal documents stay on one side."""
    chat = isinstance(document, Chat)
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, default=str) if chat else text_of(document)
    return (xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass")) >> 32) / 2**32


def encode_documents(documents: Iterable[Document], encoder: Encoder) -> Iterator[list[Encoded]]:
    """Encode documents in order, chunk by chunk; what takes them works while the next ones are encoded.

    Raises:
        Mistake: see `Encoder`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "true"  # a stage starts with it off, because of forks, of which this has none
    )
    with ThreadPoolExecutor(AHEAD) as pool:
        running: deque[Future[list[Encoded]]] = deque()
        for chunk in _chunks(documents):
            running.append(pool.submit(encoder, chunk))
            if len(running) > AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(text_of(document))
        if len(chunk) == CHUNK_DOCUMENTS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
