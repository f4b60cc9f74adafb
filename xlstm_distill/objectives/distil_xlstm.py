"""Distil-xLSTM's loss (Thiombiano et al. 2025, arXiv 2503.18565), with weights and a temperature that fall by step k:

    γ_k·CE + β_k T_k² KL(teacher^T ‖ student^T) + λ·‖mean over layers of h_teacher − h_student, last‖_F / √numel
    v_k = v_end + (v_start − v_end) / (1 + ln(1 + k))      for β and T;      γ_k = γ + β − β_k

The paper's are β .8 → .5, T 2 → 1, λ .1 and γ_k = 1 − β_k − λ, so γ .1. It leaves open, and ours are: k counts steps of
the optimiser from 0; the layers are the teacher's decoder layers, each by what it gives to the next, the embedding not
among them; the student's hidden states are those that its head reads; the norm is taken over each sequence, and
sequences count by their tokens that count, so that neither micro-batches nor ranks change it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from xlstm_distill.objectives.distill import DenseTargets, distillation_loss

TINY = 1e-12
"""Below this mean square the distance has no gradient: √ has none at 0."""


@dataclass(frozen=True)
class Weights:
    """Of the three terms at one step."""

    gamma: float
    beta: float
    hidden: float
    """λ."""
    temperature: float


def annealed(start: float, end: float, step: float) -> float:
    """v_k; `step` may be infinite."""
    return end + (start - end) / (1 + math.log1p(step))


class DistilXLSTMLoss(NamedTuple):
    """Scalars, float32."""

    loss: Tensor
    """What is differentiated."""
    ce: Tensor
    """Weighted sum of the cross-entropy, nats."""
    kl: Tensor
    """Weighted sum of T² times the KL, nats."""
    hidden: Tensor
    """The distance of the hidden states."""


def distil_xlstm_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    targets: DenseTargets,
    at: Weights,
    *,
    soft_cap: float | None = None,
    vocabulary: int = 0,
) -> DistilXLSTMLoss:
    """The loss over B sequences of T positions.

    Args:
        hidden: [B, T, H], the student's last hidden states after the final norm.
        head_weight: [V, H].
        labels: int64 [B, T], the next tokens.
        weights: float32 [B, T]: mask over count of the global batch's valid tokens.
        targets: the teacher at the B·T positions, with `layers_mean`.
        at: weights and temperature of this step.
        soft_cap: as for `distillation_loss`.
        vocabulary: as for `distillation_loss`.

    Raises:
        TypeError: the targets hold no mean of layers.
    """
    if targets.layers_mean is None:
        raise TypeError("Distil-xLSTM's loss needs the teacher's hidden states: targets without layers_mean")
    found = distillation_loss(
        hidden.flatten(0, 1),
        head_weight,
        labels.flatten(),
        weights.flatten(),
        targets,
        kind="full",
        gamma=at.gamma,
        beta=at.beta,
        temperature=at.temperature,
        soft_cap=soft_cap,
        vocabulary=vocabulary,
    )
    distance = hidden_distance(hidden, targets.layers_mean.view_as(hidden), weights)
    return DistilXLSTMLoss(found.loss + at.hidden * distance, found.ce, found.kl, distance)


def hidden_distance(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Σ over sequences of (Σ_t weight) · √(mean of (teacher − student)² over positions with a weight and features).

    Args:
        student: [B, T, H].
        teacher: [B, T, H].
        weights: [B, T], equal or 0 within a sequence.
    """
    counts = weights > 0
    squares = (teacher.float() - student.float()).square().mean(-1).masked_fill(~counts, 0.0)
    mean = squares.sum(1) / counts.sum(1).clamp_min(1)
    return (mean.clamp_min(TINY).sqrt() * weights.sum(1)).sum()
