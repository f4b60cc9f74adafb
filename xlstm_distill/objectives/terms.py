"""What Stage II's loss is of one chunk of positions, and its gradient with respect to the logits, written in place.

The logits of a chunk are the only thing of size [n, V]: they become the gradient where they stand. What the derivation
needs of the vocabulary is one softmax: over all tokens that are not the teacher's (`r`), whose sum is the student's
tail. The teacher's tokens are few and are worked out apart.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xlstm_distill.objectives.divergence import Divergence, divergence

Kind = Literal["full", "topk_tail", "topk", "random"]
BLOCK = {"cpu": 1 << 20}
"""Logits that are worked on together where copies are needed: in a CPU's cache, or enough to keep a GPU busy."""
GPU_BLOCK = 1 << 22


@dataclass(frozen=True)
class SparseTargets:
    """The teacher at N positions: k tokens of each, and the mass of the rest.

    For `random` the tokens are drawn (Random Sampling KD), `log_probs` are the logs of their importance weights, and
    the tail is not read. Where a row has fewer than k, `log_probs` is −inf, and any id may stand there.
    """

    ids: Tensor
    """int64 [N, k]."""
    log_probs: Tensor
    """float32 [N, k], over the whole vocabulary."""
    tail_log_mass: Tensor
    """float32 [N]."""
    temperature: float = 1.0
    """Of the teacher's softmax."""

    def slice(self, rows: slice) -> "SparseTargets":
        """Some of the positions."""
        return SparseTargets(self.ids[rows], self.log_probs[rows], self.tail_log_mass[rows], self.temperature)


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's whole distribution, as what makes its logits."""

    hidden: Tensor
    """[N, H_teacher] after the final norm."""
    head_weight: Tensor
    """[V_teacher, H_teacher]."""
    soft_cap: float | None = None
    """c of c·tanh(z/c) on the teacher's logits."""
    layers_mean: Tensor | None = None
    """[N, H_teacher] float32, mean over the decoder layers' outputs, where it was asked for."""

    def slice(self, rows: slice) -> "DenseTargets":
        """Some of the positions."""
        return DenseTargets(self.hidden[rows], self.head_weight, self.soft_cap)


Targets = SparseTargets | DenseTargets


@dataclass(frozen=True)
class Form:
    """Which loss: see `distillation_loss`."""

    kind: Kind
    gamma: float
    beta: float
    divergence: Divergence = "forward"
    temperature: float = 1.0
    soft_cap: float | None = None
    vocabulary: int = 0
    """Tokens; later rows of the head are padding."""

    @property
    def copies(self) -> bool:
        """Whether the gradient needs more of size [n, V] than the logits."""
        return self.kind == "full" or self.temperature != 1 or bool(self.soft_cap)


def chunk_terms_(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor, targets: Targets, form: Form
) -> tuple[Tensor, Tensor]:
    """CE [n] and T²·D [n] in nats; `logits` become the gradient of Σ weights (γ CE + β T² D).

    Args:
        logits: [n, V] of the student, without soft cap.
        teacher: [n, V_teacher] likewise; only with dense targets. They are overwritten.
        labels: int64 [n].
        weights: [n], 0 for positions that count for nothing.
        targets: the teacher at these positions.
        form: which loss.
    """
    size = BLOCK.get(logits.device.type, GPU_BLOCK)
    step = max(1, size // logits.shape[1]) if form.copies else max(1, len(logits))
    parts = []
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        inner = targets.slice(rows) if isinstance(targets, SparseTargets) else teacher[rows]  # type: ignore[index]
        parts.append(_terms_(logits[rows], inner, labels[rows, None], weights[rows, None], form))
    ce, divergences = (torch.cat(x) for x in zip(*parts, strict=True))
    return ce, divergences


def _terms_(
    logits: Tensor, targets: SparseTargets | Tensor, labels: Tensor, weights: Tensor, form: Form
) -> tuple[Tensor, Tensor]:
    """As `chunk_terms_`, with labels and weights [n, 1]. s: capped logits; CE is of softmax(s), D of softmax(s / T)."""
    cap_(logits, form.soft_cap)
    slope = 1 - (logits / form.soft_cap).square_() if form.soft_cap else None
    logits[:, form.vocabulary :] = -torch.inf
    of_label = logits.gather(1, labels)
    temperature = form.temperature
    # One softmax serves both terms, unless they have two temperatures. ∂(T² D)/∂s = T ∂D/∂(s / T).
    apart = logits.clone() if temperature != 1 else None
    gamma = form.gamma * weights if apart is None else torch.zeros_like(weights)
    beta = form.beta * temperature * weights
    if apart is not None:
        logits.div_(temperature)
    part = _full_ if isinstance(targets, Tensor) else _random_ if form.kind == "random" else _top_
    values, log_sum = part(logits, targets, gamma, beta, form)  # type: ignore[arg-type]
    if apart is not None:
        log_sum, mass = _exp_(apart)
        logits.add_(apart.mul_(form.gamma * weights / mass))
    logits.scatter_add_(1, labels, -form.gamma * weights.expand_as(labels))
    if slope is not None:
        logits.mul_(slope)
    return (log_sum - of_label)[:, 0], temperature**2 * values


def cap_(logits: Tensor, soft_cap: float | None) -> None:
    """logits := c·tanh(logits / c), where there is a cap."""
    if soft_cap:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)


def _exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits := exp(logits − the row's maximum); their log-sum-exp before, and sum now: at least 1, or 0 where all were
    −inf; both [n, 1]."""
    highest = logits.amax(1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    mass = logits.sub_(highest).exp_().sum(1, keepdim=True)
    return highest + mass.log(), mass


# Each of the three: logits := γ softmax(logits) + β G; returns D [n] and the logits' log-sum-exp [n, 1].


def _top_(logits: Tensor, targets: SparseTargets, gamma: Tensor, beta: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """D over the teacher's k tokens, renormalised, or over these and the tail.

    The tail is summed itself: 1 − Σ of the top is zero in float32 where the tail is small. Of the vocabulary there is
    r = softmax(logits outside the top) alone: the tail's q_j is r_j Q_tail, and its share of G is r_j G_tail; for the
    forward KL this is q_j (1 − P_tail / Q_tail).
    """
    given = _known(targets, form)
    # A place without mass may hold any id, one of the row's too: it takes the likeliest one's, and does what that does.
    empty, likeliest = given == -torch.inf, given.argmax(1, keepdim=True)
    ids = torch.where(empty, targets.ids.gather(1, likeliest), targets.ids)
    top = logits.gather(1, ids).masked_fill_(empty, -torch.inf)
    logits.scatter_(1, ids, -torch.inf)
    rest, mass = _exp_(logits)
    log_sum = torch.logaddexp(rest, top.logsumexp(1, keepdim=True))
    if form.kind == "topk":
        teacher = (given * (targets.temperature / form.temperature)).log_softmax(1)
        values, top_grad = divergence(form.divergence, teacher, top.log_softmax(1))
        tail_grad = torch.zeros_like(rest)
    else:
        teacher = torch.cat([given, targets.tail_log_mass[:, None]], 1).log_softmax(1)
        values, grad = divergence(form.divergence, teacher, torch.cat([top, rest], 1) - log_sum)
        top_grad, tail_grad = grad[:, :-1], grad[:, -1:]
    logits.mul_((gamma * (rest - log_sum).exp() + beta * tail_grad) / mass.clamp_min(1.0))
    top_grad = gamma * (top - log_sum).exp() + beta * top_grad
    logits.scatter_(1, ids, torch.where(empty, top_grad.gather(1, likeliest), top_grad))
    return values, log_sum


def _random_(logits: Tensor, targets: SparseTargets, gamma: Tensor, beta: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Σ w (log w − log q) over the drawn tokens: G = q − w, whose mean over draws is that of the full forward KL."""
    drawn = logits.gather(1, targets.ids)
    log_sum, mass = _exp_(logits)
    log_weights = _known(targets, form).log_softmax(1)
    share = log_weights.exp()
    terms = share * (log_weights - drawn + log_sum)
    logits.mul_((gamma + beta) / mass)
    logits.scatter_add_(1, targets.ids, -beta * share)
    return terms.masked_fill(share == 0, 0.0).sum(1), log_sum


def _full_(logits: Tensor, teacher: Tensor, gamma: Tensor, beta: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """D over the vocabulary."""
    inner = logits[:, : form.vocabulary]
    log_sum = inner.logsumexp(1, keepdim=True)
    log_probs = inner - log_sum
    log_teacher = (teacher[:, : form.vocabulary] / form.temperature).log_softmax(1)
    values, grad = divergence(form.divergence, log_teacher, log_probs)
    inner.copy_(grad.mul_(beta).addcmul_(log_probs.exp_(), gamma))
    logits[:, form.vocabulary :] = 0.0
    return values, log_sum


def _known(targets: SparseTargets, form: Form) -> Tensor:
    """The teacher's log masses, none at ids that are padding."""
    return targets.log_probs.masked_fill(targets.ids >= form.vocabulary, -torch.inf)
