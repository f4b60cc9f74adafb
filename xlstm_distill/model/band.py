"""Window and sinks on the CPU, for rows without padding: forward and backward in blocks, nothing copied.

Per block of queries torch's flash kernel attends to a slice of the keys. It returns the log-sum-exp of its scores, with
which the few sinks join the same softmax; its backward, given output and log-sum-exp of the *joint* softmax, yields
exactly the window's part of the gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import full_precision

BLOCK = 64
"""Queries per block: of the W + 63 keys that a block reads, a query needs W."""
ALIGN = 16
"""A block reads a multiple of so many keys: float32 matrix products are a third faster for it."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def band_attention(query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int) -> Tensor:
    """One softmax over the last W and the first `sinks` positions; query, key, value [B, H, T, D] → [B, H, T, D]."""
    return _Band.apply(query, key, value, window, sinks)  # type: ignore[no-untyped-call, no-any-return]


class _Band(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int) -> Tensor:
        out = torch.empty_like(query)
        total = query.new_empty(query.shape[:3], dtype=_accumulate(query))
        mask = _band_mask(query, window)
        for now, seen, rows, columns in _blocks(query.shape[2], window):
            out[:, :, now], total[:, :, now] = _forward(
                query[:, :, now], key[:, :, seen], value[:, :, seen], attn_mask=mask[rows, columns][None, None]
            )
        if sinks:
            scores = _sink_scores(query, key[:, :, :sinks], window)
            joint = torch.logaddexp(total, scores.logsumexp(-1))
            out *= (total - joint).exp_()[..., None]
            out += (scores - joint[..., None]).exp_().to(out.dtype) @ value[:, :, :sinks]
            total = joint
        ctx.save_for_backward(query, key, value, out, total)
        ctx.window, ctx.sinks = window, sinks
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        window, sinks = ctx.window, ctx.sinks
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        mask = _band_mask(query, window)
        for now, seen, rows, columns in _blocks(query.shape[2], window):
            d_query[:, :, now], for_key, for_value = _backward(
                grad[:, :, now], query[:, :, now], key[:, :, seen], value[:, :, seen], out[:, :, now],
                total[:, :, now], 0.0, False, attn_mask=mask[rows, columns][None, None],
            )  # fmt: skip
            d_key[:, :, seen] += for_key
            d_value[:, :, seen] += for_value
        if sinks:
            first = slice(0, sinks)
            weights = (_sink_scores(query, key[:, :, first], window) - total[..., None]).exp().to(grad.dtype)
            inner = (grad * out).sum(-1, keepdim=True)
            d_scores = weights * (grad @ value[:, :, first].mT - inner) * query.shape[-1] ** -0.5
            d_query += d_scores @ key[:, :, first]
            d_key[:, :, first] += d_scores.mT @ query
            d_value[:, :, first] += weights.mT @ grad
        return d_query, d_key, d_value, None, None


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(length: int, window: int) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Per block: its queries, the keys it reads, and the part of `_band_mask` that says which of them it sees."""
    reach = _reach(window)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first = max(0, start - reach)
        yield (
            slice(start, stop),
            slice(first, stop),
            slice(0, stop - start),
            slice(first - start + reach, stop - start + reach),
        )


def _reach(window: int) -> int:
    """Keys that a block reads before its first query."""
    return window - 1 + -(window - 1) % ALIGN


def _band_mask(query: Tensor, window: int) -> Tensor:
    """[BLOCK, reach + BLOCK]: 0 where a query sees a key, −∞ elsewhere; column c is key c − reach from the start."""
    reach = _reach(window)
    inside = torch.ones(BLOCK, reach + BLOCK, dtype=torch.bool).tril(reach).triu(reach - window + 1)
    return torch.zeros(inside.shape, dtype=query.dtype).masked_fill_(~inside, -torch.inf)


def _sink_scores(query: Tensor, sink_key: Tensor, window: int) -> Tensor:
    """[B, H, T, n] scores of the sinks that left the window; −∞ for the others."""
    scores = (query @ sink_key.mT).to(_accumulate(query)) * query.shape[-1] ** -0.5
    position = torch.arange(query.shape[2], device=query.device)
    inside = position[:, None] - torch.arange(sink_key.shape[2], device=query.device) < window
    return scores.masked_fill_(inside, -torch.inf)
