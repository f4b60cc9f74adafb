"""What the student learns from: the teacher's distribution over the next token, whole or sparse."""

import torch
from torch import Tensor


def sparse_targets(hidden: Tensor, head_weight: Tensor, top_k: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k log-probabilities at temperature 1 and the mass of all other tokens.

    The logits of `chunk` positions exist at one time, never all. The tail is summed itself: 1 − Σ of the top would be
    zero in float32 where the tail is small.

    Args:
        hidden: [N, H], the teacher's last hidden states after the final norm.
        head_weight: [V, H].
        top_k: k, at most V.
        chunk: positions per product with the head.

    Returns:
        ids int64 [N, k] in order of falling probability, log-probabilities float32 [N, k], log of the tail's mass
        float32 [N] (−inf when k = V).
    """
    parts = [_sparse_chunk(rows @ head_weight.T, top_k) for rows in hidden.split(chunk)]
    ids, log_probs, tail = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(log_probs), torch.cat(tail)


def _sparse_chunk(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.float()
    top, ids = logits.topk(top_k, dim=-1)
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(-1) if top_k < logits.shape[1] else top.new_full((len(top),), -torch.inf)
    normaliser = torch.logaddexp(top.logsumexp(-1), rest)
    return ids, top - normaliser[:, None], rest - normaliser
