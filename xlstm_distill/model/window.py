"""Softmax attention over the last W positions and the first `sinks` positions of the sequence, in O(T·W).

A query at position p sees p − W + 1 … p, and those of its document's sinks that are older (paper Eq. 11, second term).
Three ways to the same numbers: `band.py` on the CPU for rows without padding, FlexAttention on CUDA, and blocks of
queries under masks for everything else.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .band import band_attention
from .flex import flex_window, has_flex
from .layout import DOCUMENT, Layout

SMALLEST_BLOCK = 64


class Sinks(NamedTuple):
    """Keys and values of the sinks. M: one set for all blocks of queries (1), or one for each."""

    key: Tensor
    """[B, H, M, n, D]"""
    value: Tensor
    """[B, H, M, n, E]"""
    position: Tensor
    """[B or 1, M, n], −1 for a sink that does not exist."""


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, layout: Layout | None
) -> Tensor:
    """Attention of a whole sequence.

    Args:
        query: [B, H, T, D].
        key: [B, H, T, D].
        value: [B, H, T, E].
        window: W.
        sinks: first positions of each row, or document, on top of the window.
        layout: padding and documents; None: neither.

    Returns:
        [B, H, T, E]; 0 or finite on padding.
    """
    length = query.shape[2]
    if layout is None and length <= window + sinks:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if has_flex(query):
        return flex_window(query, key, value, window, sinks, layout)
    if layout is None and query.device.type == "cpu":
        return band_attention(query, key, value, window, sinks)
    position = layout.position if layout else torch.arange(length, device=query.device)[None]
    split = layout is not None and layout.split
    block = _block(length, window, split)
    chosen = _sinks_of_blocks(key, value, position, sinks, block) if split else _sinks(key, value, position, sinks)
    return _blocked(query, key, value, position, position, chosen, window, block)


def window_attention_cached(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, key_position: Tensor, sinks: Sinks, window: int
) -> Tensor:
    """Attention of T new positions that also read a cache.

    Args:
        query: [B, H, T, D].
        key: [B, H, S, D]: the `S − T` positions before the first query, then the queries' own.
        value: [B, H, S, E].
        position: [B, T], −1 for padding.
        key_position: [B, S].
        sinks: the row's sinks, M = 1.
        window: W.
    """
    block = _block(query.shape[2], window, split=False)
    return _blocked(query, key, value, position, key_position, sinks, window, block)


def _block(length: int, window: int, split: bool) -> int:
    """Queries per block. Blocks of at most W need the sinks of one document only: that of their first query."""
    return min(length, window if split else max(window, SMALLEST_BLOCK))


def _blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    key_position: Tensor,
    sinks: Sinks,
    window: int,
    block: int,
) -> Tensor:
    batch, _, length, _ = query.shape
    missing = window - 1 - (key.shape[2] - length)  # so that every block reads W − 1 positions before its first query
    if missing < 0:
        key, value, key_position = key[:, :, -missing:], value[:, :, -missing:], key_position[:, -missing:]
        missing = 0
    rest = -length % block
    query = F.pad(query, (0, 0, 0, rest)).unflatten(2, (-1, block))  # [B, H, N, Q, D]
    position = F.pad(position, (0, rest), value=-1).unflatten(1, (-1, block))  # [B, N, Q]
    key, value = (_spans(F.pad(x, (0, 0, missing, rest)), block, window) for x in (key, value))  # [B, H, N, K, D]
    key_position = F.pad(key_position, (missing, rest), value=-1).unfold(1, block + window - 1, block)  # [B, N, K]

    blocks = query.shape[2]
    key = torch.cat([key, sinks.key.expand(-1, -1, blocks, -1, -1)], 3)
    value = torch.cat([value, sinks.value.expand(-1, -1, blocks, -1, -1)], 3)
    mask = torch.cat([_in_window(position, key_position, window), _is_sink(position, sinks.position, window)], -1)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]  # [B·N, 1, Q, K + n]
    mixed = F.scaled_dot_product_attention(_fold(query), _fold(key), _fold(value), attn_mask=mask)
    return mixed.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _spans(x_BHSD: Tensor, block: int, window: int) -> Tensor:
    return x_BHSD.unfold(2, block + window - 1, block).transpose(-1, -2)


def _fold(x_BHNQD: Tensor) -> Tensor:
    return x_BHNQD.transpose(1, 2).flatten(0, 1)


def _in_window(position: Tensor, key_position: Tensor, window: int) -> Tensor:
    distance = position[..., :, None] - key_position[..., None, :]
    real = (key_position >= 0)[..., None, :]
    # Padding queries see everything: a softmax over nothing is NaN, and nobody reads their output.
    return (real & (distance >= 0) & (distance < window)) | (position < 0)[..., :, None]


def _is_sink(position: Tensor, sink_position: Tensor, window: int) -> Tensor:
    distance = position[..., :, None] - sink_position[..., None, :]  # [B, N, Q, n]
    same = (distance >= window) & (distance < DOCUMENT // 2)
    return (sink_position >= 0)[..., None, :] & same


def _sinks(key: Tensor, value: Tensor, position: Tensor, sinks: int) -> Sinks:
    """The first real positions of each row."""
    wanted = torch.arange(min(sinks, key.shape[2]), device=key.device)
    here = position[:, None, :] == wanted[:, None]  # [B or 1, n, T]
    found = torch.where(here.any(-1), wanted, -1)[:, None]
    return _gather(key, value, here.int().argmax(-1)[:, None], found)


def _sinks_of_blocks(key: Tensor, value: Tensor, position: Tensor, sinks: int, block: int) -> Sinks:
    """For each block the first positions of the document that its first query belongs to."""
    length = key.shape[2]
    first = torch.arange(0, length, block, device=key.device)
    at = position[:, first]  # [B, N]
    start = first - at % DOCUMENT  # documents are contiguous: their first token is so many back
    index = start[..., None] + torch.arange(min(sinks, length), device=key.device)  # [B, N, n]
    index = index.clamp(0, length - 1)
    found = position.gather(1, index.flatten(1)).view_as(index)
    same = (found >= 0) & (at >= 0)[..., None] & (found // DOCUMENT == (at // DOCUMENT)[..., None])
    return _gather(key, value, index, torch.where(same, found, -1))


def _gather(key: Tensor, value: Tensor, index: Tensor, position: Tensor) -> Sinks:
    batch, heads = key.shape[:2]
    flat = index.expand(batch, -1, -1).flatten(1)[:, None, :, None].expand(-1, heads, -1, -1)

    def take(x: Tensor) -> Tensor:
        return x.gather(2, flat.expand(-1, -1, -1, x.shape[3])).unflatten(2, index.shape[1:])

    return Sinks(take(key), take(value), position)
