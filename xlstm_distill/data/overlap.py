"""Which documents share a run of 13 words with a text of the evaluation: the n-gram check of GPT-3 (Brown et al. 2020,
appendix C) and others.

Words are runs of letters and digits, ASCII in lower case, whatever stands between them; every byte of a letter beyond
ASCII belongs to a word. The evaluation's n-grams are 64-bit hashes in a table; a document is one pass over its bytes.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

WORDS = 13
"""n, in words."""
WORD = re.compile("[0-9A-Za-z\\u0080-\\u1fff\\u2040-\\U0010ffff]+")
"""The words of a text, in which the compiled loop finds the same ones byte by byte."""
LONGEST_TAIL = 4096
"""Characters in which the last words of a passage are looked for."""


class Overlap:
    """Looks for n-grams of evaluation texts.

    Args:
        texts: the evaluation sets by name.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]]) -> None:
        from xlstm_distill.data.ngrams import fill, grams  # here, since numba takes its time to import

        self.names = tuple(texts)
        self.short = 0
        """Evaluation texts of fewer than 13 words: they cannot be found."""
        found, owners = [], []
        for number, texts_of_set in enumerate(texts.values()):
            for text in texts_of_set:
                new = grams(_bytes(text)).copy()
                self.short += not len(new)
                found.append(new)
                owners.append(np.full(len(new), number, np.int16))
        hashes, first = np.unique(np.concatenate([np.empty(0, np.uint64), *found]), return_index=True)
        sets = np.concatenate([np.empty(0, np.int16), *owners])[first]
        size = 1 << max(6, (4 * len(hashes)).bit_length())
        self._keys, self._sets = np.zeros(size, np.uint64), np.full(size, -1, np.int16)
        fill(hashes, sets, self._keys, self._sets)

    def __call__(self, text: str) -> list[str]:
        """Names of the evaluation sets with which `text` shares 13 words in a row. An n-gram that several sets hold
        counts for the first of them."""
        from xlstm_distill.data.ngrams import look

        found = np.zeros(len(self.names), np.bool_)
        look(_bytes(text), self._keys, self._sets, found)
        return [name for name, there in zip(self.names, found, strict=True) if there]


def last_words(text: str) -> str:
    """The 13 last words of `text`, in which n-grams may begin that go on behind it. The last one may be cut."""
    start = max(0, len(text) - LONGEST_TAIL)
    words = [word.start() for word in WORD.finditer(text, start)]
    return text[words[-WORDS] if len(words) >= WORDS else start :]


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)
