"""Text made on this machine for the demonstration: worked mathematics of reasoning-gym, Python's standard library, and
the language reference that comes with it.

Deterministic: seeds are fixed and files sorted, so one version of Python and of reasoning-gym gives one text.
"""

import ast
import itertools
import math
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import xxhash

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import DEMO_DOCUMENTS

MATH_SEED = 20260
STRETCH_CHARACTERS = 4000
"""Length at which a module is cut, between two top-level statements, and prose between two paragraphs."""
SKIPPED = {
    "__pycache__", "_vendor", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
"""Folders that hold tests, tables, or copies of other projects under their own terms."""
OTHER_TERMS = re.compile(
    r"(?i)\b(GPL|General Public License|Apache License|all rights reserved|Permission to use, copy)"
)
"""A file whose head says so is left out: the rest is under the Python licence alone."""


def documents(kind: str, limit: int = 0) -> Iterator[str]:
    """Texts of the demo source `kind`.

    Args:
        kind: `math`, `code` or `prose`.
        limit: at most so many; 0: `DEMO_DOCUMENTS`.

    Raises:
        Mistake: no such source, or reasoning-gym is not installed.
    """
    if kind not in DEMO_DOCUMENTS:
        raise Mistake(f"demo source {kind}: expected {', '.join(DEMO_DOCUMENTS)}")
    made = {"math": math_documents, "code": code_documents, "prose": prose_documents}[kind]()
    return itertools.islice(made, limit or DEMO_DOCUMENTS[kind])


def code_documents(root: Path | None = None) -> Iterator[str]:
    """Stretches of the standard library's modules, at most one per module in the first round, cut between statements.

    Args:
        root: folder of Python files; None: this Python's standard library.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in sorted(root.rglob("*.py")) if not SKIPPED.intersection(file.relative_to(root).parts))
    # By hash of the name, not by name: a short prefix then holds a bit of everything, and no file its neighbours.
    by_hash = sorted(files, key=lambda file: xxhash.xxh64_intdigest(file.relative_to(root).as_posix().encode()))
    left: list[Iterator[str]] = []
    for file in by_hash:  # parsed only when its turn comes
        stretches = iter(_stretches(file))
        if first := next(stretches, None):
            left.append(stretches)
            yield first
    while left:
        left, current = [], left
        for stretches in current:
            if text := next(stretches, None):
                left.append(stretches)
                yield text


def prose_documents() -> Iterator[str]:
    """Stretches of Python's language reference as `help()` has it. Its topics repeat each other's paragraphs: each
    stands once, so that no held-out text was trained on."""
    by_hash = sorted(topics, key=lambda topic: xxhash.xxh64_intdigest(topic.encode()))
    seen: set[str] = set()
    for topic in by_hash:
        text = ""
        for paragraph in topics[topic].split("\n\n"):
            if paragraph.strip() in seen:
                continue
            seen.add(paragraph.strip())
            if text and len(text) + len(paragraph) > STRETCH_CHARACTERS:
                yield text
                text = ""
            text += paragraph.strip("\n") + "\n\n"
        if len(text) > STRETCH_CHARACTERS // 4:
            yield text


def _stretches(file: Path) -> list[str]:
    """Runs of whole top-level statements of about `STRETCH_CHARACTERS`; much shorter and longer ones are left out."""
    source = file.read_text(encoding="utf-8", errors="replace")
    if OTHER_TERMS.search(source[:3000]):
        return []
    try:
        starts = [_first_line(statement) - 1 for statement in ast.parse(source).body]
    except (SyntaxError, ValueError):
        return []
    lines = source.splitlines(keepends=True)
    pieces = ["".join(lines[a:b]) for a, b in zip([0, *starts[1:]], [*starts[1:], len(lines)], strict=True)]
    found, text = [], ""
    for piece in pieces:
        if text and len(text) + len(piece) > STRETCH_CHARACTERS:
            found.append(text)
            text = ""
        text += piece
    return [
        stretch.strip() + "\n"
        for stretch in [*found, text]
        if STRETCH_CHARACTERS // 4 <= len(stretch) <= 2 * STRETCH_CHARACTERS
    ]


def _first_line(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(d.lineno for d in decorators)])


def math_documents() -> Iterator[str]:
    """Questions with worked answers, the generators in turn."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise Mistake(
            "demo source math: reasoning-gym is not installed; run: pip install 'reasoning-gym>=0.1.25'"
        ) from error
    size = 1 << 20  # made one by one, when asked for
    sets = [
        (reasoning_gym.create_dataset(name, size=size, seed=MATH_SEED + number, **settings), worked)
        for number, (name, settings, worked) in enumerate(GENERATORS)
    ]
    for index in range(size):
        for items, worked in sets:
            item = items[index]
            question, answer = _natural(item["question"]), _natural(str(item["answer"]))
            steps = worked(item["metadata"]).strip()
            yield f"Question: {question}\nAnswer: {steps}\nThe answer is {answer.rstrip('.')}.\n"


INSTRUCTIONS = re.compile(r"( Give (only|the result)| Write the factors| Do not |Your task is to count|\(Answer Yes).*")
"""Sentences about the form of the answer, which is given here."""


def _natural(text: str) -> str:
    """Without instructions about the form of the answer, and without LaTeX around fractions."""
    text = re.sub(r"\\d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", INSTRUCTIONS.sub("", text)).replace("$\\", "$")
    text = re.sub(r"\$(\d+/\d+)\$", r"\1", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n", text).strip()


def _story(facts: Mapping[str, Any]) -> str:
    """The solution that comes with the problem."""
    return re.sub(r"\n?#### .*", "", str(facts["answer_cot"])).strip()


def _chain(facts: Mapping[str, Any]) -> str:
    """A sum from left to right, one step a line."""
    first, *rest = facts["expression"].split()
    value, lines = int(first), ["We go from left to right."]
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = value + int(term) if sign == "+" else value - int(term)
        lines.append(f"{value} {sign} {term} = {after}")
        value = after
    return "\n".join(lines)


def _product(facts: Mapping[str, Any]) -> str:
    """a · b by the tens and ones of b."""
    a, b = (int(n) for n in facts["expression"].split(" * "))
    tens, ones = b - b % 10, b % 10
    parts = [f"{a} * {part} = {a * part}" for part in (tens, ones)]
    return "\n".join([f"{b} = {tens} + {ones}", *parts, f"{a * tens} + {a * ones} = {a * b}"])


def _euclid(a: int, b: int) -> list[str]:
    lines = []
    a, b = max(a, b), min(a, b)
    while b:
        lines.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return [*lines, f"The last remainder that is not 0 is {a}."]


def _common_divisor(facts: Mapping[str, Any]) -> str:
    return "\n".join(["We divide with remainder until nothing is left.", *_euclid(*facts["numbers"])])


def _common_multiple(facts: Mapping[str, Any]) -> str:
    a, b = facts["numbers"]
    divisor = math.gcd(a, b)
    return "\n".join(
        [
            "First the greatest common divisor.",
            *_euclid(a, b),
            f"{a} * {b} = {a * b}",
            f"{a * b} / {divisor} = {math.lcm(a, b)}",
        ]
    )


def _fraction(facts: Mapping[str, Any]) -> str:
    a, b, factor = facts["numerator"], facts["denominator"], facts["reduction_factor"]
    return "\n".join(
        [
            *_euclid(a, b),
            f"We divide both by {factor}.",
            f"{a} / {factor} = {a // factor}",
            f"{b} / {factor} = {b // factor}",
        ]
    )


def _factors(facts: Mapping[str, Any]) -> str:
    value, lines = facts["number"], []
    for factor in facts["factors"][:-1]:
        lines.append(f"{value} = {factor} * {value // factor}")
        value //= factor
    return "\n".join([*lines, f"{value} is prime."])


def _sequence(facts: Mapping[str, Any]) -> str:
    *known, following = facts["sequence"]
    return f"The rule is: {facts['rule']}.\nAfter {known[-1]} comes {following}."


def _legs(facts: Mapping[str, Any]) -> str:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, lines = 0, []
    for animal, count in facts["animals"].items():
        legs = count * ANIMALS[animal]
        lines.append(f"{animal}: {count} * {ANIMALS[animal]} = {legs}, together {total + legs}")
        total += legs
    return "\n".join(lines)


def _syllogism(facts: Mapping[str, Any]) -> str:
    follows = "follows" if facts["is_valid"] else "does not follow"
    return f"We know: {facts['premise1']}. {facts['premise2']}.\nFrom this it {follows}: {facts['conclusion']}."


Worked = Callable[[Mapping[str, Any]], str]
GENERATORS: tuple[tuple[str, dict[str, Any], Worked], ...] = (
    ("gsm_symbolic", {}, _story),
    ("chain_sum", {"max_terms": 5, "max_digits": 2}, _chain),
    ("products", {"min_digits": 2, "max_digits": 2}, _product),
    ("gcd", {}, _common_divisor),
    ("gsm_symbolic", {}, _story),
    ("lcm", {}, _common_multiple),
    ("fraction_simplification", {}, _fraction),
    ("prime_factorization", {}, _factors),
    ("number_sequence", {}, _sequence),
    ("leg_counting", {}, _legs),
    ("syllogism", {}, _syllogism),
)
"""reasoning-gym's name of each, its settings, and how the answer is worked out from what the item records."""
