"""The teacher's distribution at N positions → k tokens of each: the likeliest, drawn ones, or both.

    topk     the k likeliest, their log-probabilities, and the mass of all others
    random   k draws with replacement from p; each token drawn has the weight count / k, whose mean is p: the gradient
             of KL(p ‖ q) comes out without bias (Random Sampling KD: Anshumann et al. 2025)
    hybrid   the k − ⌊k/2⌋ likeliest with their probabilities, and ⌊k/2⌋ draws with replacement from the others, which
             share the others' mass by count: without bias too, and with less variance, since only the tail is drawn

The draws are given as numbers in [0, 1), so that they depend on nothing but the sample that they are for.
"""

from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from xlstm_distill.objectives.distill import WIDE_PRODUCTS
from xlstm_distill.objectives.terms import cap_

Sampler = Literal["topk", "random", "hybrid"]
DRAW_ROWS = 64
"""Positions whose sums of probabilities, in float64, exist at one time."""
BELOW_ONE = 1 - 2.0**-40


def draws_of(sampler: Sampler, top_k: int) -> int:
    """Draws per position."""
    return {"topk": 0, "random": top_k, "hybrid": top_k // 2}[sampler]


def uniforms(positions: int, draws: int, *key: int | str) -> Tensor:
    """float64 [positions, draws] in [0, 1) that depend on `key` (seed, source, split, number of the sample) alone."""
    seed = xxhash.xxh3_128_intdigest("\0".join(map(str, key)).encode())
    numbers = np.random.Generator(np.random.Philox(key=seed)).random((positions, draws))
    return torch.from_numpy(numbers)


def sparse_targets(
    hidden: Tensor,
    head_weight: Tensor,
    top_k: int,
    chunk: int,
    *,
    sampler: Sampler = "topk",
    draws: Tensor | None = None,
    soft_cap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """k tokens of the teacher's softmax(s / T) at each position, s the logits, with soft cap where there is one.

    The logits of `chunk` positions exist at one time, never all; the normaliser is their log-sum-exp.

    Args:
        hidden: [N, H], the teacher's last hidden states after the final norm.
        head_weight: [V, H].
        top_k: k, at most V.
        chunk: positions per product with the head.
        sampler: which tokens.
        draws: [N, `draws_of(sampler, k)`] of `uniforms`; None with `topk`.
        soft_cap: c of c·tanh(s/c).
        temperature: T.

    Returns:
        ids int64 [N, k], log-probabilities or log weights float32 [N, k] in falling order, and log of the mass of all
        other tokens float32 [N]. What is drawn stands for the whole: its weights sum to 1, that mass is −inf, and a row
        with fewer tokens than k ends with weights of −inf.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    parts = []
    with torch.autocast(device, enabled=False):
        head = head_weight.to(dtype)
        for start in range(0, len(hidden), chunk):
            logits = _product(hidden[start : start + chunk].to(dtype), head)
            cap_(logits, soft_cap)
            if temperature != 1:
                logits.div_(temperature)
            here = draws[start : start + chunk].to(logits.device) if draws is not None else None
            parts.append(_pick_(logits, top_k, sampler, here))
    ids, log_probs, tail = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(log_probs), torch.cat(tail)


def _product(rows: Tensor, head: Tensor) -> Tensor:
    """Logits in float32. Rounded to bfloat16 they would cost more than the codec."""
    if rows.is_cuda and rows.dtype != torch.float32 and WIDE_PRODUCTS:
        return torch.mm(rows, head.T, out_dtype=torch.float32)
    return (rows @ head.T).float()


def _pick_(logits: Tensor, top_k: int, sampler: Sampler, draws: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk; the logits [n, V] are overwritten."""
    none = logits.new_full((len(logits),), -torch.inf)
    if sampler == "random":
        assert draws is not None
        return *_drawn(logits, logits.logsumexp(-1), draws), none
    count = top_k - draws_of(sampler, top_k)
    top, ids = logits.topk(count, dim=-1)
    logits.scatter_(1, ids, -torch.inf)
    rest = (
        logits.logsumexp(-1) if count < logits.shape[1] else none
    )  # summed itself: 1 − Σ would be 0 where it is small
    normaliser = torch.logaddexp(top.logsumexp(-1), rest)
    log_probs, tail = top - normaliser[:, None], rest - normaliser
    if sampler == "topk":
        return ids, log_probs, tail
    assert draws is not None
    more, shares = _drawn(logits, rest, draws)
    log_weights, order = torch.cat([log_probs, shares + tail[:, None]], 1).sort(dim=1, descending=True)
    return torch.cat([ids, more], 1).gather(1, order), log_weights, none


def _drawn(logits: Tensor, log_sum: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens drawn with replacement from softmax(logits [n, V]), each once: ids int64 [n, N], log(count / N) float32
    [n, N] in falling order; where a row has fewer, id 0 and −inf. A row without any mass has none."""
    blocks = zip(*(x.split(DRAW_ROWS) for x in (logits, log_sum, draws)), strict=True)
    parts = [_draw(*block) for block in blocks]
    ids, log_shares = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(log_shares)


def _draw(logits: Tensor, log_sum: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    empty = log_sum == -torch.inf
    sums = (logits.double() - log_sum.masked_fill(empty, 0.0)[:, None]).exp_().cumsum_(-1)
    # Below the last sum, so that a token without mass is never found.
    found = torch.searchsorted(sums, draws.clamp(max=BELOW_ONE) * sums[:, -1:], right=True)
    found = found.clamp_(max=logits.shape[1] - 1).sort(-1).values
    first = torch.ones_like(found, dtype=torch.bool)
    first[:, 1:] = found[:, 1:] != found[:, :-1]
    place = first.cumsum(-1) - 1
    counts = torch.zeros_like(found, dtype=torch.float32).scatter_add_(1, place, torch.ones_like(found).float())
    ids = torch.zeros_like(found).scatter_(1, place, found)
    log_shares = (counts / draws.shape[1]).log().masked_fill(empty[:, None], -torch.inf)
    log_shares, order = log_shares.sort(dim=1, descending=True)
    return ids.gather(1, order), log_shares
