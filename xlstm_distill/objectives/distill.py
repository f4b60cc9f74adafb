"""Stage II (paper §3.2, Eq. 13): γ·CE + β·KL(teacher ‖ student), fused with the LM head.

The logits of `chunk` positions exist at one time. The gradient with respect to the logits is written down, not traced,
and taken through the head in the forward pass, so that nothing of size [T, V] is ever kept.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["full", "topk_tail", "topk"]


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's top-k of N positions and the mass of the rest."""

    ids: Tensor
    """int64 [N, k]."""
    log_probs: Tensor
    """float32 [N, k], at temperature 1 over the whole vocabulary."""
    tail_log_mass: Tensor
    """float32 [N]."""

    def slice(self, rows: slice) -> "SparseTargets":
        """Some of the positions."""
        return SparseTargets(self.ids[rows], self.log_probs[rows], self.tail_log_mass[rows])


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's whole distribution, as what makes its logits."""

    hidden: Tensor
    """[N, H_teacher] after the final norm."""
    head_weight: Tensor
    """[V, H_teacher]."""

    def slice(self, rows: slice) -> "DenseTargets":
        """Some of the positions."""
        return DenseTargets(self.hidden[rows], self.head_weight)


Targets = SparseTargets | DenseTargets


class DistillationLoss(NamedTuple):
    """Scalars, float32."""

    loss: Tensor
    """γ·ce + β·kl: what is differentiated."""
    ce: Tensor
    """Weighted sum of the cross-entropy, nats."""
    kl: Tensor
    """Weighted sum of the KL divergence, nats."""


def distillation_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    targets: Targets,
    *,
    kind: Kind,
    gamma: float,
    beta: float,
    chunk: int = 256,
) -> DistillationLoss:
    """Eq. 13 over N positions.

    Args:
        hidden: [N, H], the student's last hidden states after the final norm.
        head_weight: [V, H].
        labels: int64 [N], the next tokens.
        weights: float32 [N]: mask over count of the global batch's valid tokens.
        targets: the teacher at these positions; dense for `full`, sparse for the others.
        kind: KL over the vocabulary, over top-k and a tail bucket, or over renormalised top-k (the paper).
        gamma: weight of the cross-entropy.
        beta: weight of the KL.
        chunk: positions whose logits exist at one time.

    Raises:
        TypeError: `kind` and targets do not go together.
    """
    if (kind == "full") != isinstance(targets, DenseTargets):
        raise TypeError(f"loss {kind!r} and targets {type(targets).__name__} do not go together")
    return DistillationLoss(*_Fused.apply(hidden, head_weight, labels, weights, targets, kind, gamma, beta, chunk))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        targets: Targets,
        kind: Kind,
        gamma: float,
        beta: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        grad_head = torch.zeros_like(head_weight, dtype=torch.float32) if head_weight.requires_grad else None
        ce_sum = kl_sum = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ head_weight.T).float()
            ce, kl, grad = _terms(logits, labels[rows], targets.slice(rows), kind, gamma, beta)
            ce_sum = ce_sum + ce @ weights[rows]
            kl_sum = kl_sum + kl @ weights[rows]
            grad = (grad * weights[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head_weight
            if grad_head is not None:
                grad_head += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_weight.dtype
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return gamma * ce_sum + beta * kl_sum, ce_sum, kl_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype) if grad_hidden is not None else None,
            (grad_head * grad).to(ctx.head_dtype) if grad_head is not None else None,
            *[None] * 7,
        )


def _terms(
    logits: Tensor, labels: Tensor, targets: Targets, kind: Kind, gamma: float, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """CE [n], KL [n] and the gradient of γ·CE + β·KL with respect to the logits [n, V] (float32)."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    ce = -log_probs.gather(1, labels[:, None])[:, 0]
    if isinstance(targets, DenseTargets):
        kl, kl_grad = _full(log_probs, probs, targets)
    elif kind == "topk_tail":
        kl, kl_grad = _topk_tail(logits, log_probs, probs, targets)
    else:
        kl, kl_grad = _topk(log_probs, targets)
    grad = kl_grad.mul_(beta).add_(probs, alpha=gamma)
    grad.scatter_add_(1, labels[:, None], grad.new_full((len(labels), 1), -gamma))
    return ce, kl, grad


def _full(log_probs: Tensor, probs: Tensor, targets: DenseTargets) -> tuple[Tensor, Tensor]:
    teacher = (targets.hidden @ targets.head_weight.T).float().log_softmax(-1)
    mass = teacher.exp()
    return (mass * (teacher - log_probs)).sum(-1), probs - mass


def _topk_tail(logits: Tensor, log_probs: Tensor, probs: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """KL over k + 1 outcomes; the decoded targets are normalised over them first."""
    teacher = torch.cat([targets.log_probs, targets.tail_log_mass[:, None]], 1).log_softmax(-1)
    top, tail = teacher[:, :-1], teacher[:, -1]
    # The student's tail is summed itself: 1 − Σ of its top is zero in float32 where the tail is small.
    rest = logits.scatter(1, targets.ids, -torch.inf).logsumexp(-1)
    student_tail = rest - logits.logsumexp(-1)
    student_top = log_probs.gather(1, targets.ids)
    tail_mass = tail.exp()
    tail_term = torch.where(tail_mass > 0, tail_mass * (tail - student_tail), 0.0)
    kl = (top.exp() * (top - student_top)).sum(-1) + tail_term
    # d KL / d logit_j: p_S(j) − p_T(j) in the top, p_S(j)·(1 − tail_T / tail_S) outside.
    ratio = torch.where(tail_mass > 0, (tail - student_tail).exp(), 0.0)
    grad = probs * (1 - ratio)[:, None]
    grad.scatter_(1, targets.ids, student_top.exp() - top.exp())
    return kl, grad


def _topk(log_probs: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """KL with teacher and student renormalised over the teacher's top-k (the paper)."""
    teacher = targets.log_probs.log_softmax(-1)
    student = log_probs.gather(1, targets.ids).log_softmax(-1)
    grad = torch.zeros_like(log_probs).scatter_(1, targets.ids, student.exp() - teacher.exp())
    return (teacher.exp() * (teacher - student)).sum(-1), grad
