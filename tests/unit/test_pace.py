"""A slow rank is named with what it is slow at; ranks that are alike, or apart by nothing that matters, are not."""

import pytest

from xlstm_distill.contract.job import World
from xlstm_distill.runtime.pace import Pace, slow_ranks


def test_ranks_that_are_alike_are_not_named():
    assert slow_ranks([(0.10, 1.0), (0.12, 1.1), (0.11, 0.9), (0.10, 1.0)]) == []


@pytest.mark.parametrize(("column", "cause"), [(0, "data"), (1, "compute")])
def test_the_slow_one_is_named_for_what_it_is_slow_at(column, cause):
    seconds = [[0.1, 0.1] for _ in range(4)]
    seconds[3][column] = 0.23
    (slow,) = slow_ranks(seconds)
    assert (slow.rank, slow.cause, slow.seconds) == (3, cause, 0.23)
    assert slow.ratio == pytest.approx(2.3)


def test_one_of_two_is_compared_with_the_other():
    (slow,) = slow_ranks([(0.0, 0.30), (0.0, 0.18)])
    assert (slow.rank, slow.ratio) == (0, pytest.approx(0.3 / 0.18))


@pytest.mark.parametrize("value", [0.29, 0.049])
def test_less_than_half_more_or_than_50_ms_more_is_nothing(value):
    usual = {0.29: 0.2, 0.049: 0.0}[value]
    assert slow_ranks([(usual, 1.0)] * 3 + [(value, 1.0)]) == []


def test_the_worst_comes_first_and_the_slow_do_not_hide_each_other():
    found = slow_ranks([(0.1, 1.0), (0.5, 1.0), (0.1, 4.0), (0.1, 1.0), (0.3, 1.0)])
    assert [(slow.rank, slow.cause) for slow in found] == [(2, "compute"), (1, "data"), (4, "data")]


def test_one_rank_alone_is_never_slow():
    assert slow_ranks([(5.0, 5.0)]) == []
    pace = Pace(World(), every=1)
    assert [pace.step(5.0, 5.0) for _ in range(3)] == [None] * 3


class Four(Pace):
    """The ranks 1 to 3 take 0.1 s for data and 1 s to compute."""

    def __init__(self, every: int) -> None:
        super().__init__(World(0, 4), every)
        self.exchanges = 0

    def _gather(self, mine):
        self.exchanges += 1
        self._hosts = ["a", "b", "c", "d"]
        return [mine, *([[0.1, 1.0]] * 3)]


def test_the_mean_over_the_steps_between_two_exchanges_counts():
    pace = Four(every=20)
    lines = [pace.step(1.0 if step == 0 else 0.1, 1.0) for step in range(20)]
    assert lines == [None] * 20  # 0.145 on average
    assert pace.exchanges == 1
    assert pace.slowest == pytest.approx(1.145 / 1.1)
    lines = [pace.step(0.23, 1.0) for _ in range(20)]
    assert lines == [None] * 19 + ["rank 0 (host a) is slow: data 2.3× the median of the others (0.23 s per step)"]


def test_a_rank_is_named_for_a_cause_once_in_100_steps():
    pace = Four(every=20)
    at = [step + 1 for step in range(240) if pace.step(0.3, 1.0)]
    assert at == [20, 120, 220]
    assert pace.step(0.3, 1.0) is None
    lines = [pace.step(0.3, 5.0) for _ in range(19)]
    assert "compute 4.8×" in lines[-1]
    assert "data" not in lines[-1]
