"""Stage II (paper §3.2, Eq. 13): γ·CE + β·KL(teacher ‖ student), fused with the LM head.

The logits of `chunk` positions exist at one time. The gradient with respect to the logits is written down, not traced,
over the logits themselves, and taken through the head in the forward pass: above the gradients of head and hidden
states, the memory is one [chunk, V] in float32, whatever N (with products in bfloat16, one more of those, and the head
cast to it).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_distill.objectives.divergence import Divergence
from xlstm_distill.objectives.terms import DenseTargets, Form, Kind, SparseTargets, Targets, cap_, chunk_terms_

__all__ = ["DenseTargets", "DistillationLoss", "Kind", "SparseTargets", "Targets", "distillation_loss"]


class DistillationLoss(NamedTuple):
    """Scalars, float32."""

    loss: Tensor
    """γ·ce + β·kl: what is differentiated."""
    ce: Tensor
    """Weighted sum of the cross-entropy, nats."""
    kl: Tensor
    """Weighted sum of T² times the divergence, nats."""


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
    divergence: Divergence = "forward",
    temperature: float = 1.0,
    soft_cap: float | None = None,
    vocabulary: int = 0,
    chunk: int = 256,
) -> DistillationLoss:
    """Eq. 13 over N positions.

    Args:
        hidden: [N, H], the student's last hidden states after the final norm.
        head_weight: [V, H].
        labels: int64 [N], the next tokens.
        weights: float32 [N]: mask over count of the global batch's valid tokens.
        targets: the teacher at these positions; dense for `full`, sparse for the others.
        kind: KL over the vocabulary, over top-k and a tail bucket, over renormalised top-k (the paper), or
            estimated without bias from sampled tokens.
        gamma: weight of the cross-entropy.
        beta: weight of the KL.
        divergence: what stands in the place of KL(teacher ‖ student), over the same outcomes (`divergence.py`);
            sampled tokens know the forward KL only.
        temperature: T of the softmax of teacher and student in the KL, which counts T² fold (Hinton et al. 2015). Top-k
            renormalised is brought to T here; a tail's mass and sampled weights have to be of T.
        soft_cap: c of c·tanh(z/c) on the student's logits; None: none.
        vocabulary: rows of the head that are tokens; later ones are padding, without probability and gradient; 0: all.
            Rows that a dense teacher does not have are padding too. No row of sparse targets may be padding alone.
        chunk: positions whose logits exist at one time.

    Raises:
        TypeError: `kind` and targets do not go together.
        ValueError: the targets are of another temperature, or `divergence` needs more than was sampled.
    """
    form = Form(kind, gamma, beta, divergence, temperature, soft_cap, vocabulary or len(head_weight))
    form = _checked(form, targets, len(head_weight))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if isinstance(targets, DenseTargets):
        targets = replace(targets, head_weight=targets.head_weight.to(dtype))
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, head_weight)]
    return DistillationLoss(*_Fused.apply(hidden, head_weight, labels, weights, targets, form, chunk, dtype, needs))


def _checked(form: Form, targets: Targets, rows: int) -> Form:
    """The form with the vocabulary that both have."""
    dense = isinstance(targets, DenseTargets)
    if (form.kind == "full") != dense:
        raise TypeError(f"loss {form.kind!r} and targets {type(targets).__name__} do not go together")
    if form.kind == "random" and form.divergence != "forward":
        raise ValueError(f"divergence {form.divergence!r}: sampled targets give an estimate of the forward KL only")
    if isinstance(targets, SparseTargets) and form.kind != "topk" and targets.temperature != form.temperature:
        raise ValueError(
            f"temperature {form.temperature:g}: the targets were made at {targets.temperature:g}, and the mass of "
            "what they leave out is not known at another"
        )
    known = len(targets.head_weight) if isinstance(targets, DenseTargets) else rows
    if known > rows:
        raise ValueError(f"the student's head has {rows} rows, the teacher's {known}")
    return replace(form, vocabulary=min(form.vocabulary, known))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        targets: Targets,
        form: Form,
        chunk: int,
        dtype: torch.dtype,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        rows, count = min(chunk, len(hidden)), len(head_weight)
        logits = torch.empty(rows, count, device=hidden.device, dtype=wide)
        other = torch.empty_like(logits[:, : len(targets.head_weight)]) if isinstance(targets, DenseTargets) else None
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_head = torch.zeros_like(head_weight, dtype=wide) if needs[1] else None
        ce_sum = kl_sum = torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head = head_weight.to(dtype)
            for start in range(0, len(hidden), chunk):
                here = slice(start, start + chunk)
                inputs, part, weight = hidden[here].to(dtype), targets.slice(here), weights[here]
                grad = logits[: len(inputs)]
                _product(inputs, head.T, grad)
                teacher = _teacher_logits(part, other, dtype)
                ce, kl = chunk_terms_(grad, teacher, labels[here], weight, part, form)
                ce_sum, kl_sum = ce_sum + _weighted(ce, weight), kl_sum + _weighted(kl, weight)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    _product(grad, head, grad_hidden[here])
                if grad_head is not None:
                    _add_product(grad_head, grad.T, inputs)
        # Not saved as tensors: the backward pass scales them where they stand.
        ctx.grads, ctx.head_dtype = (grad_hidden, grad_head), head_weight.dtype
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return form.gamma * ce_sum + form.beta * kl_sum, ce_sum, kl_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the distillation loss has one backward pass: its gradients were handed out")
        (grad_hidden, grad_head), ctx.grads = ctx.grads, None
        return (
            grad_hidden.mul_(grad) if grad_hidden is not None else None,
            grad_head.mul_(grad).to(ctx.head_dtype) if grad_head is not None else None,
            *[None] * 7,
        )


def _teacher_logits(targets: Targets, buffer: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if buffer is None or not isinstance(targets, DenseTargets):
        return None
    logits = buffer[: len(targets.hidden)]
    _product(targets.hidden.to(dtype), targets.head_weight.T, logits)
    cap_(logits, targets.soft_cap)
    return logits


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Σ weights ∘ values; what has no weight counts for nothing, were it infinite."""
    return (values * weights).masked_fill(weights == 0, 0.0).sum()


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out := a b. Rounded to bfloat16 on the way, logits would cost more than the codec of the targets (KL 1.7e-4)."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and WIDE_PRODUCTS:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, likewise; nothing of the size of `total` is made, but where the device lacks such a product."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)  # in place, and seen by torch's counter of FLOPs
    elif a.is_cuda and WIDE_PRODUCTS:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype_out")
"""Whether this torch multiplies bfloat16 matrices into float32 ones (on CUDA, from 2.8 on)."""
