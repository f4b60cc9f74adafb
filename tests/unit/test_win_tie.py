"""Win-and-Tie against a brute-force reading of the definition, and the corners that the definition leaves open."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.evaluate.win_tie import ALPHAS, compare

scores = st.integers(min_value=0, max_value=1000).map(lambda i: i / 1000)
pairs = st.lists(st.tuples(scores, scores), min_size=1, max_size=12)


def tables(values):
    return {f"t{i}": t for i, (t, _) in enumerate(values)}, {f"t{i}": s for i, (_, s) in enumerate(values)}


def test_a_student_within_two_per_cent_ties_at_two_per_cent():
    result = compare({"a": 1.0}, {"a": 0.98})
    assert result.critical_tolerance == pytest.approx(0.02)
    assert result.win_and_tie(0.02) == 1.0
    assert result.win_and_tie(0.01) == 0.0


def test_a_student_that_wins_everywhere_is_lossless():
    result = compare({"a": 0.5, "b": 0.1}, {"a": 0.6, "b": 0.1})
    assert result.critical_tolerance == 0
    assert result.win_and_tie(0) == 1
    assert result.recovery == {"a": 1.2, "b": 1.0}


def test_of_an_even_number_of_tasks_half_have_to_tie():
    result = compare(dict.fromkeys("abcd", 1.0), {"a": 1.0, "b": 0.9, "c": 0.5, "d": 0.1})
    assert result.critical_tolerance == pytest.approx(0.1)


def test_of_an_odd_number_of_tasks_more_than_half_have_to_tie():
    assert compare(dict.fromkeys("abc", 1.0), {"a": 1.0, "b": 0.9, "c": 0.5}).critical_tolerance == pytest.approx(0.1)


@given(pairs)
def test_c_alpha_counts_the_tasks_that_reach_the_share_of_the_teacher(values):
    teacher, student = tables(values)
    result = compare(teacher, student)
    for alpha in (0.0, 0.005, 0.3, 0.77, 1.0):
        # exact thousandths: s ≥ (1 − α) t without rounding
        wins = [round(s * 1000) * 1000 >= (1000 - round(alpha * 1000)) * round(t * 1000) for t, s in values]
        assert result.win_and_tie(alpha) == sum(wins) / len(wins)


@given(pairs)
def test_alpha_star_is_the_smallest_tolerance_at_which_half_of_the_tasks_tie(values):
    result = compare(*tables(values))
    star = result.critical_tolerance
    candidates = sorted({0.0, *(max(0.0, 1 - s / t) for t, s in values if t)})
    reference = next(a for a in candidates if sum(t == 0 or 1 - s / t <= a for t, s in values) >= len(values) / 2)
    assert star == reference
    assert result.win_and_tie(star) >= 0.5


@given(pairs)
def test_the_curve_never_falls_and_ends_at_one(values):
    curve = [compare(*tables(values)).win_and_tie(alpha) for alpha in ALPHAS]
    assert curve == sorted(curve)
    assert curve[-1] == 1


def test_a_teacher_that_scores_zero_is_a_tie_without_recovery():
    result = compare({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.4})
    assert result.win_and_tie(0) == 1
    assert result.recovery == {"a": None, "b": None}


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_student_without_a_score_loses_at_every_tolerance_and_is_listed(score):
    result = compare({"a": 1.0, "b": 1.0}, {"a": score, "b": 1.0})
    assert result.win_and_tie(1.0) == 0.5
    assert result.missing == ("a",)
    assert result.recovery["a"] is None
    assert compare({"a": 1.0}, {}).missing == ("a",)


def test_missing_on_most_tasks_leaves_no_critical_tolerance():
    assert compare({"a": 1.0, "b": 1.0, "c": 1.0}, {"c": 1.0}).as_json()["critical_tolerance"] is None


def test_a_negative_student_loses_at_every_tolerance_up_to_one():
    result = compare({"a": 0.5}, {"a": -0.1})
    assert result.win_and_tie(1.0) == 0
    assert result.critical_tolerance == pytest.approx(1.2)


def test_tasks_where_lower_is_better_stay_out():
    result = compare({"acc": 1.0, "ppl": 5.0}, {"acc": 1.0, "ppl": 50.0}, {"ppl"})
    assert set(result.drops) == {"acc"}
    assert set(result.recovery) == {"acc"}


def test_the_json_has_a_hundred_and_one_points_with_short_keys():
    curve = compare({"a": 1.0}, {"a": 0.71}).as_json()["win_and_tie"]
    assert list(curve) == [str(i / 100) for i in range(101)]
    assert (curve["0.0"], curve["0.28"], curve["0.29"], curve["1.0"]) == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -0.5])
def test_a_teacher_without_a_usable_score_is_refused(value):
    with pytest.raises(Mistake, match="scores of teacher: a="):
        compare({"a": value}, {"a": 1.0})


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, "scores of m: b: the teacher has no score"),
        ({}, {}, "no task to compare on"),
        ({"a": 1.0}, {"a": "high"}, "a='high': expected a number"),
        ({"a": True}, {"a": 1.0}, "a=True: expected a number"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(teacher, student, message):
    with pytest.raises(Mistake, match=message):
        compare(teacher, student, name="m")
