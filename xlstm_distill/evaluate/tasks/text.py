"""Held-out documents, read back from the validation shards: every source has them, wherever its text came from."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 64
"""Held-out sequences of a source that tasks are made from, at most."""


@dataclass(frozen=True)
class Fragment:
    """What one sample holds of one document: a piece of running text."""

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    """Whether a token counts as a label (in a chat: the assistant's)."""


def read_fragments(source: Path) -> list[Fragment]:
    """The fragments of a source's first held-out samples, in order.

    Args:
        source: folder of one source in the token shards, which holds `validation/`.
    """
    from xlstm_distill.data.stream import read_samples

    batch = read_samples(source / "validation", SAMPLES)
    rows = zip(batch.tokens.tolist(), batch.mask.tolist(), batch.document.tolist(), strict=True)
    return [fragment for tokens, mask, document in rows for fragment in split(tokens, mask, document)]


def split(tokens: list[int], mask: list[bool], document: list[int]) -> list[Fragment]:
    """Cut one sample where its document changes."""
    cuts = [0, *(i for i in range(1, len(document)) if document[i] != document[i - 1]), len(document)]
    return [Fragment(tuple(tokens[a:b]), tuple(mask[a:b])) for a, b in itertools.pairwise(cuts) if b > a]


def decode(tokenizer: "PreTrainedTokenizerBase", tokens: tuple[int, ...] | list[int], special: bool = False) -> str:
    """Text of `tokens`, without special tokens unless asked for; nothing tidied."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False))
