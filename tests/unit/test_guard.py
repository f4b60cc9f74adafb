"""Sick steps are found, counted and told; healthy ones are not touched."""

import math
import random
import statistics

import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Guard as Settings
from xlstm_distill.runtime.guard import WINDOW, Guard


def healthy(guard: Guard, count: int) -> list[float]:
    rng = random.Random(0)
    losses = [2.0 + rng.gauss(0, 0.1) for _ in range(count)]
    assert not any(guard.judge({"loss": loss, "grad_norm": 1.0}) for loss in losses)
    return losses


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_is_sick_from_the_first_step_on(name, value):
    guard = Guard(Settings())
    assert guard.judge({"loss": 1.0, "grad_norm": 1.0, name: value}) == f"{name} is {value}"
    assert (guard.skipped, guard.row) == (1, 1)
    assert guard.judge({"loss": 1.0, "grad_norm": 1.0}) == ""
    assert (guard.skipped, guard.row) == (1, 0)


def test_a_spike_lies_beyond_sigmas_of_the_last_128_healthy_steps():
    guard = Guard(Settings(spike_sigma=6.0))
    losses = healthy(guard, WINDOW + 40)[-WINDOW:]
    limit = statistics.fmean(losses) + 6 * statistics.pstdev(losses)
    assert "above" in guard.judge({"loss": limit + 1e-6, "grad_norm": 1.0})
    assert guard.judge({"loss": limit - 1e-6, "grad_norm": 1.0}) == ""  # the spike did not join the past


def test_a_gradient_alone_can_spike():
    guard = Guard(Settings(spike_sigma=6.0))
    for n in range(WINDOW):
        guard.judge({"loss": 2.0, "grad_norm": 1.0 + 0.01 * (n % 2)})
    assert guard.judge({"loss": 2.0, "grad_norm": 9.0}).startswith("grad_norm is 9, above")


def test_spikes_are_an_option_and_need_a_past():
    off, young = Guard(Settings()), Guard(Settings(spike_sigma=6.0))
    healthy(off, WINDOW)
    healthy(young, WINDOW - 1)
    assert off.judge({"loss": 1e9, "grad_norm": 1.0}) == young.judge({"loss": 1e9, "grad_norm": 1.0}) == ""


def test_so_many_in_a_row_end_the_job_and_name_the_samples():
    guard = Guard(Settings(skip_limit=3))
    for step in (7, 8):
        reason = guard.judge({"loss": math.nan})
        assert guard.report(step, reason, lambda: "a: 1 2") == f"step {step} skipped: loss is nan; samples a: 1 2"
    reason = guard.judge({"loss": math.nan})
    with pytest.raises(Mistake, match=r"^3 steps in a row were skipped .* step 9 skipped: loss is nan; samples a: 5"):
        guard.report(9, reason, lambda: "a: 5")


def test_its_state_goes_on_where_it_was():
    first, second = Guard(Settings(spike_sigma=6.0)), Guard(Settings(spike_sigma=6.0))
    healthy(first, WINDOW)
    first.judge({"loss": math.nan, "grad_norm": 1.0})
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.judge({"loss": 3.0, "grad_norm": 1.0}) == first.judge({"loss": 3.0, "grad_norm": 1.0}) != ""
