"""Percentile bootstrap against a naive loop, a binomial distribution and a paired difference that is known."""

import math

import numpy as np
import pytest

from xlstm_distill.evaluate import bootstrap
from xlstm_distill.evaluate.board import Score
from xlstm_distill.evaluate.bootstrap import draw_means, draw_scores, draw_tasks, interval, spread

RNG = np.random.default_rng(1)


def items(values, prefix="q"):
    """A score with a sample per value."""
    return Score(float(np.mean(values)), None, {f"{prefix}{i}": float(v) for i, v in enumerate(values)})


def binomial_quantile(n, p, share):
    """Smallest k with P(X ≤ k) ≥ share."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= share:
            return k
    return n


def test_the_replicates_are_those_of_a_naive_loop(monkeypatch):
    monkeypatch.setattr(bootstrap, "BLOCK", 60)  # several blocks, the last one smaller
    values, replicates = RNG.random((3, 17)), 50
    fast = draw_means(values, np.random.default_rng(7), replicates)
    slow = np.empty_like(fast)
    rng = np.random.default_rng(7)
    for r in range(replicates):
        chosen = [int(rng.integers(0, 17)) for _ in range(17)]
        for m in range(3):
            slow[m, r] = sum(values[m, i] for i in chosen) / 17
    assert fast == pytest.approx(slow, abs=1e-12)


def test_the_interval_of_a_share_is_that_of_its_binomial_distribution():
    n, right = 200, 130
    score = items([1] * right + [0] * (n - right))
    found = interval(draw_scores("task", {"s": score}, replicates=20_000)["s"])
    wanted = [binomial_quantile(n, right / n, share) / n for share in (0.025, 0.975)]
    assert list(found) == pytest.approx(wanted, abs=1.01 / n)  # a step of the lattice, by chance


def test_the_spread_of_the_replicates_is_the_standard_error():
    values = RNG.normal(0.5, 0.2, 400)
    drawn = draw_scores("task", {"s": items(values)}, replicates=4000)["s"]
    assert drawn.mean() == pytest.approx(values.mean(), abs=1e-3)
    assert drawn.std() == pytest.approx(values.std() / 20, rel=0.05)


def test_models_that_were_asked_the_same_items_are_drawn_together():
    values = RNG.random(50)
    drawn = draw_scores("task", {"a": items(values), "b": items(values + 0.125), "c": items(values, "other")})
    assert drawn["b"] - drawn["a"] == pytest.approx(np.full(1000, 0.125))
    assert np.std(drawn["c"] - drawn["a"]) > 0.9 * math.sqrt(2) * np.std(drawn["a"])


def test_the_order_of_the_items_in_a_file_does_not_matter():
    values = RNG.random(9)
    backwards = Score(values.mean(), None, dict(reversed(items(values).samples.items())))
    drawn = draw_scores("task", {"a": items(values), "b": backwards})
    assert drawn["a"] == pytest.approx(drawn["b"])


def test_an_interval_does_not_move_when_a_student_comes_beside():
    a, b, c = (items(RNG.random(30)) for _ in range(3))
    normal = Score(0.5, 0.05)
    alone = draw_scores("task", {"a": a, "n": normal})
    beside = draw_scores("task", {"c": c, "b": b, "a": a, "m": normal, "n": normal})
    assert all(np.array_equal(alone[name], beside[name]) for name in ("a", "n"))
    assert not np.array_equal(beside["m"], beside["n"])


def test_tasks_are_drawn_apart_from_one_another():
    score = items(RNG.random(30))
    one, other = (draw_scores(task, {"a": score})["a"] for task in ("one", "other"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_without_samples_a_score_is_drawn_from_a_normal_distribution():
    drawn = draw_scores("task", {"s": Score(0.5, 0.04)}, replicates=20_000)["s"]
    assert list(interval(drawn)) == pytest.approx([0.5 - 1.96 * 0.04, 0.5 + 1.96 * 0.04], abs=3e-3)
    assert draw_scores("task", {"s": Score(0.01, 0.5)})["s"].min() == 0  # no score is below 0
    assert set(draw_scores("task", {"s": Score(0.5)})["s"]) == {0.5}


def test_a_model_without_a_score_stays_without():
    assert np.isnan(draw_scores("task", {"s": Score(None, 0.1)})["s"]).all()


def test_the_interval_of_infinite_and_undefined_replicates():
    assert interval(np.array([math.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert interval(np.full(3, math.nan)) is None
    assert interval(np.array([0.0] * 50 + [math.inf] * 50)) == (0.0, math.inf)


def test_tasks_are_drawn_with_replacement_and_the_same_each_time():
    drawn = draw_tasks(6)
    assert drawn.shape == (1000, 6)
    assert np.array_equal(drawn, draw_tasks(6))
    assert np.bincount(drawn.ravel()) == pytest.approx(np.full(6, 1000), rel=0.1)


@pytest.mark.parametrize(
    ("scores", "kind"),
    [
        ([items([0, 1]), items([1, 1])], "paired"),
        ([items([0, 1]), items([1, 1], "other")], "unpaired"),
        ([items([0, 1]), Score(0.5, 0.1)], "normal"),
        ([items([0, 1]), Score(1.0, 0.0)], "normal"),
        ([items([0, 1]), Score(0.5, 0.1), Score(0.5)], "none"),
        ([items([0, 1]), Score(None)], "paired"),
    ],
)
def test_how_the_spread_is_known_is_told_by_the_weakest_score(scores, kind):
    assert spread(scores) == kind
