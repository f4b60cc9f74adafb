"""Answers to mathematical questions, compared by what they mean."""

import pytest

from xlstm_distill.evaluate import mathematics
from xlstm_distill.evaluate.mathematics import Grader, process_results


@pytest.fixture(scope="module")
def grader():
    made = Grader()
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{1}{2}", "1/2", True),
        (r"\frac{1}{2}", "0.5", True),
        ("1/2", r"So it is $\boxed{\frac12}$.", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", "2", False),
        (r"\frac{1}{2}", "", False),
        ("18", "He has 3 apples and buys 15.\n#### 18", True),
        ("18", "She makes 9 * 2 = <<9*2=18>>18 every day. The answer is 17.", False),
        ("1,000", "It is 1000 dollars.", True),
        (r"[2,5)", r"The final answer is $[2,5)$. I hope it is correct.", True),
        (r"\text{Evelyn}", r"$\boxed{\text{Evelyn}}$", True),
        ("x^2+2x+1", "$(x+1)^2$", True),
        (r"\$18.90", r"It costs $\boxed{\$18.90}$.", True),
        (r"\$32,\!348", r"$\boxed{32348}$", True),
        (r"\$36", r"$\boxed{\$37}$", False),
    ],
)
def test_an_answer_is_right_when_it_means_the_same(grader, gold, answer, right):
    assert grader(gold, answer) is right


@pytest.mark.slow
def test_an_answer_that_takes_for_ever_is_wrong_and_the_next_one_is_judged(monkeypatch):
    grader = Grader(seconds=2.0)
    assert grader("2", "2")
    first = grader._process
    assert not grader("2", r"$9^{9^{9^{9^{9}}}}$")
    assert first.poll() is not None
    monkeypatch.setattr(grader, "seconds", 60.0)
    assert grader("2", "2")
    grader.close()


def test_without_math_verify_it_says_what_to_install(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text("import missing")
    monkeypatch.setattr(mathematics, "__file__", str(child))
    with pytest.raises(RuntimeError, match="math-verify"):
        Grader()("1", "1")


def test_gsm8ks_answer_stands_after_its_solution(monkeypatch):
    asked = []
    monkeypatch.setattr(mathematics, "GRADER", lambda gold, answer: asked.append((gold, answer)) or True)
    assert process_results({"answer": "So 2.\n#### 2"}, ["It is 2"]) == {"exact_match": 1.0}
    assert asked == [("2", "It is 2")]
