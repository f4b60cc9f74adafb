"""Needles in a haystack of a given length: what was said once, at any depth, is asked for at the end.

After RULER's `niah_single` and `niah_multikey` (Hsieh et al., arXiv 2404.06654), with words instead of long numbers, so
that a small teacher finds them. Deterministic: the same tokenizer, length and seed give the same items.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.evaluate.tasks.items import CHOICES, KEYS, VALUES, Item, choices_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_NEEDLES = 4
"""Of `multi`; fewer where the text is too short for them."""
SHARE = 0.5
"""Of a haystack that the needles of `multi` may take."""
HAY = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
STEP = 0.6180339887498949
"""Depths are its multiples modulo 1, so that any number of the first items spreads evenly."""


def needle(
    tokenizer: "PreTrainedTokenizerBase", many: bool, choices: bool, length: int, count: int, seed: int
) -> list[Item]:
    """Items whose prompts have `length` tokens, less than a sentence short of it.

    Args:
        tokenizer: of the teacher.
        many: whether other keys with other values stand in the text too.
        choices: four values to choose from, which with `many` all stand in the text; else the value is to be written.
        length: tokens of a prompt.
        count: items.
        seed: of the choice.

    Returns:
        Items with `depth` besides, the place of the needle from 0 (first) to 1.

    Raises:
        Mistake: `length` has no room for it.
    """
    rng = random.Random(f"needle {many} {length} {seed}")
    values = [word for word in VALUES if len(_encode(tokenizer, f" {word}")) == 1] or VALUES
    items = []
    for number in range(count):
        depth = (number + 0.5) * STEP % 1
        keys, given = rng.sample(KEYS, MOST_NEEDLES), rng.sample(values, MOST_NEEDLES + CHOICES)
        needles = [f"The code of {key} is {value}." for key, value in zip(keys, given, strict=False)]
        prompt, used = _prompt(tokenizer, needles if many else needles[:1], keys[0], depth, length, rng)
        item: Item = {"prompt": prompt, "answer": given[0]}
        if choices:
            others = given[1 : max(used, CHOICES)] if many else given[1:]
            item = choices_of(rng, prompt, f" {given[0]}", [f" {other}" for other in rng.sample(others, CHOICES - 1)])
        items.append({**item, "depth": round(depth, 3)})
    return items


def _prompt(
    tokenizer: "PreTrainedTokenizerBase",
    needles: Sequence[str],
    key: str,
    depth: float,
    length: int,
    rng: random.Random,
) -> tuple[str, int]:
    """Haystack with the first needle at `depth` and others anywhere, and the question; and how many needles it has."""
    question = f"\nWhat is the code of {key}?\nThe code of {key} is"
    begin = "Remember the codes in this text.\n"
    room = length - len(_encode(tokenizer, begin + question)) - 2  # a token may be split where texts are joined
    sizes = [len(_encode(tokenizer, f" {line}")) for line in needles]
    used = 1
    while used < len(needles) and sum(sizes[: used + 1]) <= SHARE * room:
        used += 1
    room -= sum(sizes[:used])
    hay: list[str] = []
    while room >= (size := len(_encode(tokenizer, f" {HAY[len(hay) % len(HAY)]}"))):
        hay.append(HAY[len(hay) % len(HAY)])
        room -= size
    if room < 0 or not hay:
        raise Mistake(f"eval.lengths: {length}: too short for a needle with its question")
    lines = list(hay)
    for line in needles[1:used]:
        lines.insert(rng.randrange(len(lines) + 1), line)
    lines.insert(round(depth * len(lines)), needles[0])
    return begin + " ".join(lines) + question, used


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[Any]:
    return list(tokenizer.encode(text, add_special_tokens=False))
