"""benchmarks/goodput.py: Daly's interval and expected time, against the paper's own numbers and a simulation."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

PLACE = Path(__file__).parents[2] / "benchmarks" / "goodput.py"
spec = importlib.util.spec_from_file_location("goodput", PLACE)
goodput = importlib.util.module_from_spec(spec)
sys.modules["goodput"] = goodput
spec.loader.exec_module(goodput)


@pytest.mark.parametrize(("mtbf", "optimum"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_interval_is_that_of_the_papers_figures_3_to_5(mtbf, optimum):
    """M of 24 h, 6 h and 15 min with a dump of 5 min: "the new model predicts" 117, 57 and 9.1 min."""
    assert goodput.interval(5, mtbf) == pytest.approx(optimum, rel=6e-3)


def test_where_a_save_takes_longer_than_two_failures_apart_the_interval_is_the_time_between_failures():
    assert goodput.interval(7, 3) == 3


def simulated(work, save, restart, mtbf, segments, seed=0):
    """Productive ÷ wall time, failure by failure: a segment counts when it and its checkpoint pass unharmed."""
    chance, wall, done, left = random.Random(seed), 0.0, 0, random.Random(seed).expovariate(1 / mtbf)
    needed = work + save
    while done < segments:
        if left >= needed:
            wall, left, done, needed = wall + needed, left - needed, done + 1, work + save
        else:
            wall, left, needed = wall + left, chance.expovariate(1 / mtbf), restart + work + save
    return segments * work / wall


@pytest.mark.parametrize(("work", "save", "restart", "mtbf"), [(5, 0.5, 6, 30), (20, 1, 0, 30), (10, 0.1, 8, 200)])
def test_the_expected_goodput_is_that_of_a_simulation(work, save, restart, mtbf):
    expected = goodput.expected_goodput(work, save, restart, mtbf)
    assert expected == pytest.approx(simulated(work, save, restart, mtbf, segments=20_000), rel=0.03)


def test_the_optimum_is_better_than_half_and_twice_of_it():
    best = goodput.interval(0.5, 30)
    gain = [goodput.expected_goodput(f * best, 0.5, 6, 30) for f in (0.5, 1, 2)]
    assert gain[1] == max(gain)
