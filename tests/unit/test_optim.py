"""The schedule, weight decay on matrices only, and an optimiser's state under the parameters' names."""

import math

import pytest
import torch
from torch import nn

from xlstm_distill.contract.schema import AdamW, Align, Distill
from xlstm_distill.parallel.state import set_optimizer_step, training_state
from xlstm_distill.train.optim import learning_rate, make_optimizer, set_learning_rate


def rates(steps, **settings):
    chosen = Align(**{"lr": 1e-2, "min_lr": 1e-5, "warmup": 0.1, **settings})
    return [learning_rate(step, steps, chosen.lr, chosen) for step in range(steps)]


def test_warm_up_is_linear_to_the_peak_and_the_cosine_ends_at_min_lr():
    found = rates(100)
    assert found[:10] == pytest.approx([1e-2 * (n + 1) / 10 for n in range(10)])
    assert found[10] == pytest.approx(1e-2)
    assert found[-1] == pytest.approx(1e-5)
    middle = (10 + 99) / 2
    assert found[math.floor(middle)] == pytest.approx((1e-2 + 1e-5) / 2, rel=0.03)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_a_constant_schedule_stays_at_the_peak_after_the_warm_up():
    found = rates(40, schedule="constant", warmup=0.05)
    assert found[0] == pytest.approx(5e-3)
    assert set(found[2:]) == {1e-2}


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.9])
def test_the_shortest_schedules_stay_between_zero_and_the_peak(steps, warmup):
    assert all(0 < rate <= 1e-2 for rate in rates(steps, warmup=warmup))


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def test_decay_reaches_matrices_only():
    model = module()
    optimizer = make_optimizer({1e-3: dict(model.named_parameters())}, AdamW(weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0,
    }  # fmt: skip


def test_each_group_follows_the_schedule_to_its_own_peak():
    model = module()
    groups = {1e-3: dict(model[0].named_parameters()), 1e-2: dict(model[1].named_parameters())}
    settings = Distill(lr=1e-3, warmup=0.5)
    optimizer = make_optimizer(groups, AdamW())
    assert set_learning_rate(optimizer, 0, 4, settings) == pytest.approx(5e-4)
    assert {group["peak"]: group["lr"] for group in optimizer.param_groups} == pytest.approx({1e-3: 5e-4, 1e-2: 5e-3})


def run_steps(model, optimizer, count):
    for n in range(count):
        optimizer.zero_grad()
        model(torch.full((2, 4), 0.1 * (n + 1))).square().sum().backward()
        optimizer.step()


def test_the_state_by_name_carries_training_over_to_another_optimizer():
    settings = AdamW()
    model = module()
    optimizer = make_optimizer({1e-2: dict(model.named_parameters())}, settings)
    run_steps(model, optimizer, 3)
    saved = {name: t.clone() for name, t in training_state(dict(model.named_parameters()), optimizer).items()}
    assert set(saved) == {
        f"{kind}.{n}" for kind in ("parameter", "exp_avg", "exp_avg_sq") for n in dict(model.named_parameters())
    }
    run_steps(model, optimizer, 2)

    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    second = make_optimizer({1e-2: dict(other.named_parameters())}, settings)
    for name, tensor in training_state(dict(other.named_parameters()), second).items():
        tensor.copy_(saved[name])
    set_optimizer_step(second, 3)
    run_steps(other, second, 2)
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
