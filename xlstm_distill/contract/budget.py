"""How much of a data source is wanted (`sources.NAME.tokens`): tokens of a piece, and text that holds as many."""

import math

from xlstm_distill.contract.schema import Source

CHARACTERS_PER_TOKEN = 5.0
"""More than tokenizers make of English or code: SmolLM2's takes 4.0 of Python's library and 4.2 of documentation to a
token, larger vocabularies somewhat more; other scripts take fewer."""
SPARE = 1.1
"""What is brought beyond that: chats without an answer and documents that share text with the evaluation are left out
later."""


def is_bounded(source: Source) -> bool:
    """Whether a number of tokens is wanted, and not all that there are."""
    return source.tokens > 0


def share_of(source: Source) -> int:
    """Tokens of each of a bounded source's `parts`."""
    return -(-source.tokens // source.parts)


def text_for(tokens: int) -> int:
    """Characters that hold so many tokens."""
    return math.ceil(tokens * CHARACTERS_PER_TOKEN * SPARE)
