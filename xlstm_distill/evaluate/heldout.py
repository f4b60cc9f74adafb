"""How a model does on held-out text: perplexity, and how far it stands from its teacher, position by position.

Only final hidden states of a batch are kept whole; logits exist for `CHUNK` positions at one time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 256
"""Positions whose logits over the vocabulary exist at one time."""
BUCKET = 64
"""Positions per point of the curve over positions; doubled until at most `MAX_BUCKETS` are left."""
MAX_BUCKETS = 32


@dataclass(frozen=True)
class Sample:
    """Held-out sequences of one source."""

    tokens: Tensor
    """int64 [B, T + 1]."""
    mask: Tensor
    """bool [B, T + 1]; whether a token counts as a label."""


@dataclass(frozen=True)
class Reference:
    """The teacher on the same sequences."""

    hidden: Tensor
    """[B, T, H], its last hidden states after the final norm."""
    head: Tensor
    """[V, H], its LM head."""


@torch.inference_mode()
def final_hidden(
    model: "PreTrainedModel", tokens: Tensor, batch: int, on_batch: Callable[[], None] = lambda: None
) -> Tensor:
    """Hidden states after the final norm.

    Args:
        model: a causal language model.
        tokens: int64 [B, T].
        batch: sequences per forward.
        on_batch: called after each forward.

    Returns:
        [B, T, H] on the CPU, in the model's type.
    """
    rows = []
    for part in tokens.split(batch):
        hidden = model.base_model(input_ids=part.to(model.device), use_cache=False).last_hidden_state
        rows.append(hidden.cpu())
        on_batch()
    return torch.cat(rows)


@dataclass(frozen=True)
class Losses:
    """What a model loses at each token that counts as a label, in the order of the sequences."""

    positions: Tensor
    """int64 [N], in the sequence."""
    ce: Tensor
    """[N], nats."""
    kl: Tensor
    """[N], KL(teacher ‖ model) in nats; 0 for the teacher."""
    agree: Tensor
    """[N], whether both name the same token first."""

    @classmethod
    def joined(cls, parts: "Sequence[Losses]") -> "Losses":
        """Those of several sequences as one."""
        columns = zip(*((part.positions, part.ce, part.kl, part.agree) for part in parts), strict=True)
        return cls(*map(torch.cat, columns))

    def by_sequence(self, counts: Sequence[int]) -> "list[Losses]":
        """Those of each sequence, which have so many labels."""
        columns = (column.split(list(counts)) for column in (self.positions, self.ce, self.kl, self.agree))
        return [Losses(*parts) for parts in zip(*columns, strict=True)]


def measure(
    hidden: Tensor, head: Tensor, sample: Sample, reference: Reference | None, window: int = 0
) -> dict[str, Any]:
    """`summary` of `losses`."""
    return summary(losses(hidden, head, sample, reference), sample.tokens.shape[1] - 1, window)


@torch.inference_mode()
def losses(hidden: Tensor, head: Tensor, sample: Sample, reference: Reference | None) -> Losses:
    """What one model loses on some sequences.

    Args:
        hidden: [B, T, H], from `final_hidden`.
        head: [V, H], the model's LM head, on the device to compute on.
        sample: the sequences that `hidden` stems from.
        reference: the teacher; None for the teacher itself (its KL is 0).
    """
    valid = sample.mask[:, 1:]
    labels = sample.tokens[:, 1:][valid]
    positions = torch.arange(valid.shape[1]).expand_as(valid)[valid]
    rows = [hidden[valid], *([reference.hidden[valid]] if reference else [])]
    parts = []
    for chunk in zip(labels.split(CHUNK), *(r.split(CHUNK) for r in rows), strict=True):
        parts.append(_chunk_losses(head, reference.head if reference else None, *chunk))
    return Losses(positions, *(torch.cat(column) for column in zip(*parts, strict=True)))


def summary(lost: Losses, length: int, window: int = 0) -> dict[str, Any]:
    """Numbers of one model on one source, over the tokens that count as labels.

    Args:
        lost: on all of its sequences.
        length: T.
        window: positions that the student's window covers, for the split of the KL; 0: no split.

    Returns:
        `perplexity`; `ce`, `kl` (KL(teacher ‖ model)) in nats per token; `agreement`: share of positions where both
        name the same token first; `tokens`; `positions`: `{"bucket", "kl", "ce"}` by position in the sequence (None in
        a bucket without a label); `kl_within_window`, `kl_beyond_window`.
    """
    ce, kl, agree = (column.double() for column in (lost.ce, lost.kl, lost.agree))
    return {
        "tokens": len(ce),
        "ce": ce.mean().item(),
        "perplexity": math.exp(min(ce.mean().item(), 700.0)),
        "kl": kl.mean().item(),
        "agreement": agree.mean().item(),
        "positions": by_position(lost.positions, ce, kl, length),
        **_split_at_window(lost.positions, kl, window),
    }


def _chunk_losses(
    head: Tensor, teacher_head: Tensor | None, labels: Tensor, hidden: Tensor, teacher_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, KL(teacher ‖ model) and agreement [N] of N positions, on the CPU."""
    labels = labels.to(head.device)
    logits_NV = (hidden.to(head) @ head.T).float()
    normaliser = logits_NV.logsumexp(-1)
    ce = normaliser - logits_NV.gather(1, labels[:, None]).squeeze(1)
    if teacher_hidden is None or teacher_head is None:
        return ce.cpu(), torch.zeros(len(labels)), torch.ones(len(labels))
    teacher_NV = (teacher_hidden.to(teacher_head) @ teacher_head.T).float()
    agree = teacher_NV.argmax(-1) == logits_NV.argmax(-1)
    teacher_normaliser = teacher_NV.logsumexp(-1)
    p_NV = (teacher_NV - teacher_normaliser[:, None]).exp_()
    # Logits minus logits, not log-probabilities minus logits: equal models come out at 0 to the last digit.
    kl = torch.linalg.vecdot(p_NV, teacher_NV.sub_(logits_NV)) - teacher_normaliser + normaliser
    return ce.cpu(), kl.clamp(min=0).cpu(), agree.float().cpu()


def by_position(positions: Tensor, ce: Tensor, kl: Tensor, length: int) -> dict[str, Any]:
    """Means over buckets of positions.

    Args:
        positions: int64 [N], position of each loss in its sequence.
        ce: [N].
        kl: [N].
        length: T.
    """
    bucket = BUCKET
    while -(-length // bucket) > MAX_BUCKETS:
        bucket *= 2
    index, count = positions // bucket, -(-length // bucket)
    members = torch.bincount(index, minlength=count)

    def means(values: Tensor) -> list[float | None]:
        sums = torch.bincount(index, weights=values, minlength=count)
        return [(s / n).item() if n else None for s, n in zip(sums, members, strict=True)]

    return {"bucket": bucket, "kl": means(kl), "ce": means(ce)}


def _split_at_window(positions: Tensor, kl: Tensor, window: int) -> dict[str, float]:
    """KL of the positions whose whole past lies in the window, and of the others."""
    if not window:
        return {}
    parts = {"kl_within_window": kl[positions < window], "kl_beyond_window": kl[positions >= window]}
    return {name: part.mean().item() for name, part in parts.items() if len(part)}


def save_hidden(path: Path, hidden: Tensor, key: str) -> None:
    """Keep the teacher's hidden states for the models that follow; whole or not at all, whoever else keeps the same.

    Args:
        path: file to write.
        hidden: [B, T, H].
        key: what they were made from; `load_hidden` asks for the same.
    """
    from safetensors.torch import save_file

    from xlstm_distill.contract.files import beside, sync

    path.parent.mkdir(parents=True, exist_ok=True)
    written = beside(path)
    save_file({"hidden": hidden.contiguous()}, written, metadata={"key": key})
    sync(written)
    written.replace(path)
    sync(path.parent)


def load_hidden(path: Path, key: str) -> Tensor | None:
    """The hidden states that `save_hidden` kept under `key`, or None."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        return file.get_tensor("hidden")
