"""Divergences between teacher and student over a few outcomes, and their derivative with respect to the student.

An outcome is a token, or a bucket of tokens whose masses are added up: the vocabulary (`full`), the teacher's top-k
renormalised (`topk`), or the top-k and one bucket with all other tokens (`topk_tail`, k + 1 outcomes). With P the
teacher's masses and Q the student's, each summing to 1:

    forward    KL(P ‖ Q) = Σ P log(P / Q)
    reverse    KL(Q ‖ P) = Σ Q log(Q / P)
    jsd        ½ KL(P ‖ M) + ½ KL(Q ‖ M),  M = (P + Q) / 2, at most log 2

A bucket hides what happens inside it: over buckets each of the three is at most what it is over the vocabulary.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["forward", "reverse", "jsd"]
FLOOR = -100.0
"""The reverse KL reads a smaller log mass of the teacher as this one: at P = 0 it would be infinite."""


def divergence(kind: Divergence, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and what the student's logits feel of it.

    Args:
        kind: which.
        teacher: log P [n, m], each row normalised; −inf where there is no mass.
        student: log Q [n, m], likewise.

    Returns:
        D [n] in nats, and G [n, m] = Q ∘ (∂D/∂Q − Σ Q ∂D/∂Q): the derivative with respect to the logit of an outcome
        that is one token. The token j of a bucket o gets its share, G_o q_j / Q_o.
    """
    return _KINDS[kind](teacher, student)


def _forward(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    mass = teacher.exp()
    return _expectation(mass, teacher - student), student.exp() - mass


def _reverse(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    mass = student.exp()
    terms = _where_mass(mass, student - teacher.clamp_min(FLOOR))
    value = terms.sum(-1)
    return value, terms.addcmul_(mass, value[:, None], value=-1)


def _jsd(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    middle = torch.logaddexp(teacher, student) - math.log(2)
    mass = student.exp()
    terms = _where_mass(mass, student - middle)
    total = terms.sum(-1)
    value = (_expectation(teacher.exp(), teacher - middle) + total) / 2
    return value, terms.addcmul_(mass, total[:, None], value=-1).div_(2)


def _where_mass(mass: Tensor, value: Tensor) -> Tensor:
    """mass ∘ value, with 0 · log 0 = 0."""
    return value.mul_(mass).masked_fill_(mass == 0, 0.0)


def _expectation(mass: Tensor, value: Tensor) -> Tensor:
    return _where_mass(mass, value).sum(-1)


_KINDS: dict[Divergence, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward": _forward,
    "reverse": _reverse,
    "jsd": _jsd,
}
