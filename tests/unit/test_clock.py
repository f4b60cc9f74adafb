"""The clock: each second belongs to one part, and the parts add up to the wall clock."""

import time
from contextlib import suppress

import pytest
import torch

from xlstm_distill.runtime.clock import OTHER, PARTS, Clock

CPU = torch.device("cpu")


@pytest.fixture
def hands(monkeypatch):
    """A clock on the wall that moves only when told: `hands(seconds)`."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_each_part_has_its_seconds_and_the_rest_is_other(hands):
    clock = Clock(CPU)
    hands(1)
    with clock("data"):
        hands(2)
    with clock("forward"):
        hands(4)
    with clock("data"):
        hands(8)
    hands(16)
    taken = clock.take()
    assert set(taken) == {*PARTS, OTHER}
    assert {part: s for part, s in taken.items() if s} == {"data": 10, "forward": 4, OTHER: 17}


def test_time_in_an_inner_part_is_not_counted_in_the_outer_one(hands):
    clock = Clock(CPU)
    with clock("teacher"):
        hands(1)
        with clock("forward"):
            hands(2)
            with clock("backward"):
                hands(4)
            hands(8)
        hands(16)
    taken = clock.take()
    assert (taken["teacher"], taken["forward"], taken["backward"], taken[OTHER]) == (17, 10, 4, 0)


@pytest.mark.parametrize("waiting", ["validation", "checkpoint"])
def test_what_a_validation_or_a_save_does_is_not_told_apart(hands, waiting):
    clock = Clock(CPU)
    with clock(waiting):
        hands(1)
        with clock("teacher"), clock("forward"):
            hands(2)
    with clock("forward"):
        hands(4)
    taken = clock.take()
    assert (taken[waiting], taken["teacher"], taken["forward"]) == (3, 0, 4)


def test_each_take_starts_anew_even_inside_a_part(hands):
    clock = Clock(CPU)
    with clock("data"):
        hands(1)
        assert clock.take()["data"] == 1
        hands(2)
    hands(4)
    taken = clock.take()
    assert (taken["data"], taken[OTHER]) == (2, 4)
    assert sum(clock.take().values()) == 0


def test_a_part_that_fails_ends_there(hands):
    clock = Clock(CPU)
    with suppress(ValueError), clock("data"):
        hands(1)
        raise ValueError
    hands(2)
    taken = clock.take()
    assert (taken["data"], taken[OTHER]) == (1, 2)


def test_a_part_that_does_not_exist_is_refused(hands):
    clock = Clock(CPU)
    with pytest.raises(KeyError), clock("date"):
        pass


def test_parts_add_up_to_the_time_on_the_wall():
    clock, began = Clock(CPU), time.perf_counter()
    for _ in range(1000):
        with clock("data"), clock("forward"):
            pass
    taken = clock.take()
    assert sum(taken.values()) == pytest.approx(time.perf_counter() - began, rel=0.2, abs=0.05)


def test_a_part_costs_microseconds():
    clock, began = Clock(CPU), time.thread_time()
    for _ in range(1000):
        with clock("data"), clock("forward"):
            pass
    assert (time.thread_time() - began) / 2000 < 50e-6
