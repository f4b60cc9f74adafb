"""The demo's text is right, readable and always the same."""

import ast
import re
import subprocess
import sys

import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import DEMO_DOCUMENTS
from xlstm_distill.data.demo import GENERATORS, code_documents, documents

EQUATION = re.compile(r"^(?:\w[\w ]*: )?(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)(?:,.*)?$", re.MULTILINE)
DIVISION = re.compile(r"^(\d+) = (\d+) \* (\d+) \+ (\d+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def math() -> list[str]:
    return list(documents("math", 40 * len(GENERATORS)))


def test_every_worked_step_is_true(math):
    checked = 0
    for text in math:
        for a, sign, b, result in EQUATION.findall(text):
            a, b, result = int(a), int(b), int(result)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign] == result, text
            checked += 1
        for a, b, c, rest in DIVISION.findall(text):
            assert int(a) == int(b) * int(c) + int(rest), text
            checked += 1
    assert checked > 10 * 40


def test_a_question_is_followed_by_its_answer_and_says_nothing_of_forms(math):
    for text in math:
        assert re.fullmatch(r"Question: .+\nAnswer: .+\nThe answer is .+\.\n", text, re.DOTALL)
        assert "####" not in text
        assert "final answer." not in text
        assert "$\\" not in text


def test_the_worked_sum_ends_with_the_answer(math):
    sums = [text for text in math if "from left to right" in text]
    assert len(sums) == 40
    assert all(text.split(" = ")[-1].split("\n")[0] == text.split("The answer is ")[1].rstrip(".\n") for text in sums)


def test_code_is_whole_statements_of_many_modules():
    texts = list(documents("code", 12))
    assert len(set(texts)) == 12
    for text in texts:
        ast.parse(text)
        assert 500 < len(text) <= 8000


def test_tests_and_files_under_other_terms_are_left_out(tmp_path):
    body = "\n".join(f"def function_{i}():\n    return {i}\n" for i in range(60))
    for name, head in {"good.py": "", "test/test_x.py": "", "gpl.py": "# under the GPL\n", "bad.py": "def (\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(head + f"NAME = {name!r}\n" + body, encoding="utf-8")
    found = list(code_documents(tmp_path))
    assert found
    assert all("good.py" in found[0] and "gpl" not in text and "test_x" not in text for text in found)


def test_prose_says_nothing_twice():
    """Its topics do, and what is held out would then have been trained on."""
    paragraphs = [{p.strip() for p in text.split("\n\n") if p.strip()} for text in documents("prose")]
    assert sum(map(len, paragraphs)) == len(set().union(*paragraphs)) > 1000


def test_a_limit_cuts_and_an_unknown_source_is_named():
    assert len(list(documents("math", 3))) == 3
    with pytest.raises(Mistake, match="demo source poems: expected math, code, prose"):
        documents("poems")


@pytest.mark.slow
def test_another_process_with_another_hash_seed_makes_the_same_text():
    program = (
        "import hashlib; from xlstm_distill.data.demo import documents\n"
        "for kind in ('math', 'code', 'prose'): print(hashlib.sha1(''.join(documents(kind)).encode()).hexdigest())"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(results) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEMO_DOCUMENTS)
def test_there_is_enough_for_the_demo(kind):
    texts = list(documents(kind))
    assert len(texts) == DEMO_DOCUMENTS[kind]
    assert sum(map(len, texts)) > 300_000
