"""Distil-xLSTM's loss against the paper's formula in float64, its schedule by hand, its invariances."""

import math

import pytest
import torch
from distil_support import PAPER
from model_support import close, tiny_teacher, tokens
from torch.nn.functional import cross_entropy, log_softmax

from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import Distill, Strategy
from xlstm_distill.objectives.distil_xlstm import Weights, annealed, distil_xlstm_loss, hidden_distance
from xlstm_distill.objectives.distill import DenseTargets
from xlstm_distill.parallel.strategy import make_strategy
from xlstm_distill.teacher.frozen import FrozenTeacher
from xlstm_distill.train.distill import AnnealedDistillation

B, T, H, V = 3, 7, 8, 23
AT = Weights(gamma=0.25, beta=0.65, hidden=0.1, temperature=1.5)


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(B, T, generator=generator) < torch.tensor([0.9, 0.5, 0.7])[:, None]
    return {
        "hidden": draw(B, T, H), "head": draw(V, H), "teacher": draw(B * T, H), "teacher_head": draw(V, H),
        "mean": draw(B * T, H), "mask": mask, "labels": torch.randint(V, (B, T), generator=generator),
    }  # fmt: skip


def naive(given, at):
    """The formula, sequence by sequence, float64."""
    hidden = given["hidden"].clone().requires_grad_()
    total, count = torch.zeros((), dtype=torch.float64), given["mask"].sum()
    for row in range(B):
        real = given["mask"][row]
        own, label = hidden[row][real], given["labels"][row][real]
        rows = slice(row * T, row * T + T)
        teacher, mean = given["teacher"][rows][real], given["mean"][rows][real]
        logits, other = own @ given["head"].T, teacher @ given["teacher_head"].T
        p = (other / at.temperature).softmax(-1)
        kl = (p * (p.log() - log_softmax(logits / at.temperature, -1))).sum()
        distance = torch.linalg.matrix_norm(mean - own, "fro") / math.sqrt(own.numel())
        ce = cross_entropy(logits, label, reduction="sum")
        total = total + at.gamma * ce + at.beta * at.temperature**2 * kl + at.hidden * distance * len(own)
    total = total / count
    return total, torch.autograd.grad(total, hidden)[0]


def fused(given, at, rows=slice(None), count=None):
    hidden = given["hidden"][rows].float().requires_grad_()
    flat = {name: given[name].view(B, T, H)[rows].flatten(0, 1).float() for name in ("teacher", "mean")}
    targets = DenseTargets(flat["teacher"], given["teacher_head"].float(), None, flat["mean"])
    weights = given["mask"][rows].float() / (count or given["mask"].sum())
    found = distil_xlstm_loss(hidden, given["head"].float(), given["labels"][rows], weights, targets, at)
    return found, torch.autograd.grad(found.loss, hidden)[0]


@pytest.mark.parametrize("at", [AT, Weights(0.1, 0.8, 0.1, 2.0), Weights(0.0, 0.0, 1.0, 1.0)])
def test_value_and_gradient_are_those_of_the_formula_in_float64(given, at):
    wanted, gradient = naive(given, at)
    found, ours = fused(given, at)
    assert float(found.loss) == pytest.approx(float(wanted), rel=1e-6)
    parts = at.gamma * found.ce + at.beta * found.kl + at.hidden * found.hidden
    close(found.loss, parts, 1e-6)
    assert (ours.double() - gradient).norm() < 1e-5 * gradient.norm()


def test_micro_batches_add_up_to_the_batch(given):
    count = given["mask"].sum()
    whole, gradient = fused(given, AT)
    parts = [fused(given, AT, slice(row, row + 1), count) for row in range(B)]
    close(sum(part.loss for part, _ in parts), whole.loss, 1e-6)
    close(torch.cat([g for _, g in parts]), gradient, 1e-6)


def test_a_sequence_of_which_nothing_counts_and_equal_states_give_zeros(given):
    given["mask"][1] = False
    _, gradient = fused(given, AT)
    assert gradient[1].eq(0).all()
    same = torch.randn(2, T, H, requires_grad=True)
    distance = hidden_distance(same, same.detach(), torch.full((2, T), 1 / (2 * T)))
    assert float(distance) < 1e-5
    assert torch.autograd.grad(distance, same)[0].eq(0).all()


def test_targets_without_the_layers_are_refused(given):
    targets = DenseTargets(given["teacher"], given["teacher_head"])
    with pytest.raises(TypeError, match="without layers_mean"):
        distil_xlstm_loss(given["hidden"], given["head"], given["labels"], given["mask"].float(), targets, AT)


@pytest.mark.parametrize(
    ("step", "alpha", "temperature"),
    [
        (0, 0.8, 2.0),
        (1, 0.5 + 0.3 / (1 + 0.693147), 1 + 1 / (1 + 0.693147)),
        (math.e - 1, 0.65, 1.5),  # 1 + ln e = 2: half-way
        (999, 0.5 + 0.3 / 7.907755, 1 + 1 / 7.907755),
        (math.inf, 0.5, 1.0),
    ],
)
def test_the_schedule_by_hand(step, alpha, temperature):
    assert annealed(0.8, 0.5, step) == pytest.approx(alpha, rel=1e-6)
    assert annealed(2.0, 1.0, step) == pytest.approx(temperature, rel=1e-6)
    task = AnnealedDistillation.__new__(AnnealedDistillation)
    task.settings = Distill(**PAPER)
    task.begin(step)
    # (1 − α_k − β)·CE + α_k·T_k² KL + β·distance, the paper's letters
    assert task.weights() == pytest.approx({"ce": 1 - alpha - 0.1, "kl": alpha, "hidden": 0.1})
    assert task.at().temperature == pytest.approx(temperature)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_the_teachers_mean_is_over_what_its_layers_give(tmp_path, family):
    teacher = tiny_teacher(family, num_hidden_layers=3)
    teacher.save_pretrained(tmp_path)
    ids = tokens()
    given = []
    for layer in teacher.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: given.append(output))
    last = teacher.model(ids).last_hidden_state
    frozen = FrozenTeacher(tmp_path, make_strategy(Strategy(precision="float32", threads=1), World()), layers_mean=True)
    for _ in range(2):  # a second forward starts anew
        hidden, mean = frozen(ids, torch.zeros_like(ids), lambda hidden, head: (hidden, frozen.layers_mean))
    close(mean, torch.stack(given).mean(0), 1e-5)
    close(hidden, last.flatten(0, 1), 1e-5)
