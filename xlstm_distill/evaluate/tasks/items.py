"""The items of the local tasks. Deterministic: the same held-out text, tokenizer and seed give the same items.

The tasks were chosen because a teacher of 135 M parameters is far from chance on them: a score near chance says nothing
about a student. Choices of one token share one forward.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from xlstm_distill.evaluate.tasks.text import Fragment, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = dict[str, Any]
"""`prompt` with `choices` and the index `answer`; with a text `answer`; or `text`."""

CHOICES = 4
FEWEST_PAIRS = 10
KEYS = """
river door horse table window garden bridge castle forest mountain island village tower market school doctor
king teacher engine train ship plane road field lake valley desert beach station museum library kitchen office
factory church temple palace prison hospital theater hotel restaurant farm mine port camp cave well wall gate
roof floor chair lamp clock mirror box bag bottle cup
""".split()  # noqa: SIM905
VALUES = """
apple bread cheese water milk coffee sugar salt gold silver iron copper glass paper wood stone sand snow rain
wind fire smoke light music dance game book letter picture song story dream heart hand eye ear nose foot bone
blood blue green black white yellow orange summer winter spring autumn lion tiger bear wolf eagle snake mouse
cat dog
""".split()  # noqa: SIM905
COLOURS = "red blue green black white yellow grey brown old new small big cold warm dark bright".split()  # noqa: SIM905
SUMS = "3 + 4 = 7\n11 + 2 = 13\n8 + 9 = 17\n5 + 5 = 10\n"
SENTENCE = re.compile(r"[A-Z][a-z]+(?: [A-Za-z,'-]+){6,14}[.?]")
ANSWERED = re.compile(r"(?P<prompt>Question:.*\nThe answer is)(?P<answer> [^\n]{1,24})\.\n", re.DOTALL)
WORD_TOKEN = re.compile(r" [A-Za-z_]{3,}")


def recall(tokenizer: "PreTrainedTokenizerBase", window: int, longest: int, count: int, seed: int) -> list[Item]:
    """Key-value recall in context: which value stood beside a key that has left the window.

    Args:
        tokenizer: of the teacher; values are words that it writes as one token.
        window: positions that the student's window covers; the key that is asked for lies further back.
        longest: tokens that a prompt may have.
        count: items.
        seed: of the choice.
    """
    rng = random.Random(f"recall {seed}")
    values = [word for word in VALUES if len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1] or VALUES
    keys, pairs, beyond = KEYS, *_pairs(tokenizer, "river", window, longest)
    if pairs > len(keys):
        keys = [f"{colour} {key}" for colour in COLOURS for key in KEYS]
        pairs, beyond = _pairs(tokenizer, "old river", window, longest)
    items = []
    for _ in range(count):
        chosen = rng.sample(keys, min(pairs, len(keys)))
        given = [*rng.sample(values, min(pairs, len(values))), *rng.choices(values, k=max(0, pairs - len(values)))]
        asked = rng.randrange(1, beyond + 1)
        lines = [f"The code of {key} is {value}.\n" for key, value in zip(chosen, given, strict=False)]
        prompt = f"{''.join(lines)}What is the code of {chosen[asked]}?\nThe code of {chosen[asked]} is"
        others = rng.sample(sorted(set(given) - {given[asked]}), CHOICES - 1)
        items.append(choices_of(rng, prompt, f" {given[asked]}", [f" {other}" for other in others]))
    return items


def _pairs(tokenizer: "PreTrainedTokenizerBase", key: str, window: int, longest: int) -> tuple[int, int]:
    """How many pairs a prompt has, and how many of those after the first have left the window when it ends."""
    line = len(tokenizer.encode(f"The code of {key} is apple.\n", add_special_tokens=False))
    pairs = max(FEWEST_PAIRS, min(-(-int(1.75 * window) // line), longest // line - 3))
    return pairs, max(1, pairs - 1 - -(-window // line))


def cloze(
    tokenizer: "PreTrainedTokenizerBase", fragments: Sequence[Fragment], window: int, count: int, seed: int
) -> list[Item]:
    """The next word of held-out text, one that stood before, but only further back than the window reaches.

    The wrong choices are words of the same kind: seen in the context, not within the window.

    Args:
        tokenizer: of the teacher.
        fragments: held-out text.
        window: positions that the student's window covers.
        count: items, at most; fewer where the text has no more.
        seed: of the choice.
    """
    rng = random.Random(f"cloze {seed}")
    per_fragment = max(1, -(-2 * count // max(1, len(fragments))))
    found = [item for f in fragments for item in _cloze_items(tokenizer, f.tokens, window, per_fragment, rng)]
    return rng.sample(found, min(count, len(found)))


def _cloze_items(
    tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], window: int, count: int, rng: random.Random
) -> Iterator[Item]:
    length = window + max(window, 64)
    words = [decode(tokenizer, [token]) for token in tokens]
    places = list(range(length, len(tokens)))
    rng.shuffle(places)
    for place in places:
        if not count:
            return
        if not WORD_TOKEN.fullmatch(words[place]):
            continue
        near = "".join(words[place - window - 1 : place])
        far = {w for w in words[place - length : place - window] if WORD_TOKEN.fullmatch(w) and w.strip() not in near}
        others = sorted(far - {words[place]})
        if words[place] in far and len(others) >= CHOICES - 1:
            count -= 1
            prompt = decode(tokenizer, list(tokens[place - length : place]))
            yield choices_of(rng, prompt, words[place], rng.sample(others, CHOICES - 1))


def swapped_words(texts: Sequence[str], count: int, seed: int) -> list[Item]:
    """Which is the original: a sentence of held-out text, or the same with two neighbouring words swapped?

    Args:
        texts: held-out documents.
        count: items, at most.
        seed: of the choice.
    """
    rng = random.Random(f"words {seed}")
    sentences = sorted({match for text in texts for match in SENTENCE.findall(re.sub(r"\s+", " ", text))})
    items = []
    for sentence in rng.sample(sentences, len(sentences)):
        words = sentence.split(" ")
        places = [i for i in range(1, len(words) - 2) if words[i].lower() != words[i + 1].lower()]
        if not places:
            continue
        i = rng.choice(places)
        swapped = " ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]])
        items.append(choices_of(rng, "", sentence, [swapped]))
    return items[:count]


def addition(count: int, seed: int) -> list[Item]:
    """Sums below 30 after four examples, all within a window of 64 tokens.

    Args:
        count: items.
        seed: of the choice.
    """
    rng = random.Random(f"addition {seed}")
    items = []
    for _ in range(count):
        a, b = rng.randrange(1, 15), rng.randrange(1, 15)
        items.append({"prompt": f"{SUMS}{a} + {b} =", "answer": str(a + b)})
    return items


def answers(texts: Sequence[str], count: int, longest: int = 600) -> list[Item]:
    """The final answer to a held-out question whose worked solution stands before it.

    Args:
        texts: held-out documents of the form `Question: … The answer is X.`.
        count: items, at most.
        longest: characters of a prompt.
    """
    items = []
    for text in texts:
        match = ANSWERED.match(text)
        if match and len(match["prompt"]) <= longest:
            items.append({"prompt": match["prompt"], "answer": match["answer"].strip()})
    return items[:count]


def passages(
    tokenizer: "PreTrainedTokenizerBase", fragments: Sequence[Fragment], length: int, count: int
) -> list[Item]:
    """Short held-out texts for perplexity: the first `length` tokens of the fragments that are as long."""
    long_enough = [f for f in fragments if len(f.tokens) >= length]
    step = max(1, len(long_enough) // count)
    return [{"text": decode(tokenizer, f.tokens[:length])} for f in long_enough[::step][:count]]


def choices_of(rng: random.Random, prompt: str, right: str, wrong: list[str]) -> Item:
    """An item with the right choice among the wrong ones, in any order."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"prompt": prompt, "choices": choices, "answer": choices.index(right)}
