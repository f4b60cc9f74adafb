"""Softmax attention over the last W positions and the first `sinks` positions of the sequence, in O(T·W).

Positions are ordinals of *real* tokens: 0 for the first token of a row that is not padding, −1 for padding. So a
left-padded row computes what it would alone, and its sinks are its first real tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    sink_key: Tensor,
    sink_value: Tensor,
    sink_position: Tensor,
    window: int,
) -> Tensor:
    """One softmax over window and sinks (paper Eq. 11, second term), in blocks of queries.

    A query at ordinal p sees the ordinals p − W + 1 … p, and those of the sinks that are older.

    Args:
        query: [B, H, T, D].
        key: [B, H, S, D]: the `S − T` positions before the first query, then the queries' own.
        value: [B, H, S, E].
        query_position: [B, T] or [1, T] ordinals, −1 for padding (its output is 0).
        key_position: [B, S] or [1, S] ordinals, −1 for padding.
        sink_key: [B, H, N, D].
        sink_value: [B, H, N, E].
        sink_position: [B, N] or [1, N] ordinals, −1 for a sink that does not exist.
        window: W.

    Returns:
        [B, H, T, E].
    """
    batch, _, length, _ = query.shape
    block = min(length, max(window, 64))
    past = key.shape[2] - length
    missing = window - 1 - past  # so that every block reads W − 1 positions before its first query
    rest = -length % block
    if missing < 0:
        key, value, key_position = key[:, :, -missing:], value[:, :, -missing:], key_position[:, -missing:]
        missing = 0
    query = F.pad(query, (0, 0, 0, rest)).unflatten(2, (-1, block))  # [B, H, N, Q, D]
    query_position = F.pad(query_position, (0, rest), value=-1).unflatten(1, (-1, block))  # [B, N, Q]
    key, value = (_spans(F.pad(x, (0, 0, missing, rest)), block, window) for x in (key, value))  # [B, H, N, K, D]
    key_position = F.pad(key_position, (missing, rest), value=-1).unfold(1, block + window - 1, block)  # [B, N, K]

    blocks = query.shape[2]
    key = torch.cat([key, _to_blocks(sink_key, blocks)], 3)
    value = torch.cat([value, _to_blocks(sink_value, blocks)], 3)
    mask = torch.cat(
        [_in_window(query_position, key_position, window), _is_sink(query_position, sink_position, window)], -1
    )
    mixed = F.scaled_dot_product_attention(_fold(query), _fold(key), _fold(value), attn_mask=_fold_mask(mask, batch))
    return mixed.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _spans(x_BHSD: Tensor, block: int, window: int) -> Tensor:
    return x_BHSD.unfold(2, block + window - 1, block).transpose(-1, -2)


def _to_blocks(sink_BHND: Tensor, blocks: int) -> Tensor:
    return sink_BHND[:, :, None].expand(-1, -1, blocks, -1, -1)


def _fold(x_BHNQD: Tensor) -> Tensor:
    return x_BHNQD.transpose(1, 2).flatten(0, 1)


def _fold_mask(mask_BNQK: Tensor, batch: int) -> Tensor:
    return mask_BNQK.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]


def _in_window(query_position: Tensor, key_position: Tensor, window: int) -> Tensor:
    distance = query_position[..., :, None] - key_position[..., None, :]
    real = (key_position >= 0)[..., None, :]
    # Padding queries see everything: a softmax over nothing is NaN, and nobody reads their output.
    return (real & (distance >= 0) & (distance < window)) | (query_position < 0)[..., :, None]


def _is_sink(query_position: Tensor, sink_position: Tensor, window: int) -> Tensor:
    distance = query_position[..., :, None] - sink_position[:, None, None, :]
    return (sink_position >= 0)[:, None, None, :] & (distance >= window)
