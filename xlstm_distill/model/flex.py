"""Window and sinks by FlexAttention: one compiled kernel that visits only the blocks that the mask leaves."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .layout import DOCUMENT, Layout

BLOCK = 128
"""Queries, and keys, that the kernel visits or leaves out together."""
SMALLEST_HEAD = 16
"""Narrower heads do not fit the kernel's matrix tiles."""


def has_flex(query: Tensor) -> bool:
    """Whether `flex_window` serves this tensor: on CUDA (on the CPU it has no backward), heads of a power of two."""
    dim = query.shape[-1]
    return query.is_cuda and dim >= SMALLEST_HEAD and dim & (dim - 1) == 0


def flex_window(query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, layout: Layout | None) -> Tensor:
    """As `window.window_attention`."""
    if layout is None:
        mask = _plain_mask(query.shape[2], window, sinks, query.device)
    else:
        mask = window_mask(layout.position.expand(len(query), -1), window, sinks)
    return _compiled()(query, key, value, block_mask=mask)


def window_mask(position: Tensor, window: int, sinks: int) -> BlockMask:
    """Mask of one softmax over window and sinks, for `position` int64 [B, T]; padding sees itself.

    Made from the blocks' first and last positions: `create_block_mask` would look at all T² pairs.
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        here, there = position[batch, query], position[batch, key]
        distance = here - there
        sink = (there % DOCUMENT < sinks) & (distance < DOCUMENT // 2)
        real = (here >= 0) & (there >= 0) & (distance >= 0) & ((distance < window) | sink)
        return real | (query == key)

    length = position.shape[1]
    padded = F.pad(position, (0, -length % BLOCK), value=-1).unflatten(1, (-1, BLOCK))  # [B, N, BLOCK]
    document = (padded // DOCUMENT).amax(-1).cummax(1).values  # last of each block, or of one before
    opening = torch.cat([document[:, :1] * 0, document[:, :-1]], 1)  # at most the document that a block begins with
    with_sinks = ((padded >= 0) & (padded % DOCUMENT < sinks)).any(-1)  # [B, N]
    number = torch.arange(padded.shape[1], device=position.device)
    apart = BLOCK * (number[:, None] - number - 1) + 1  # least distance of a query and a key of two blocks
    reached = (apart < window) | (with_sinks[:, None] & (document[:, None] >= opening[:, :, None]))
    seen = (number[:, None] >= number) & reached  # [B, N, N], a superset: `sees` decides in the end
    count, index = seen.sum(-1), seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        count[:, None].to(torch.int32), index[:, None].to(torch.int32), BLOCK_SIZE=BLOCK, mask_mod=sees,
        seq_lengths=(length, length),
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _plain_mask(length: int, window: int, sinks: int, device: torch.device) -> BlockMask:
    """For rows without padding, of any batch."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((query - key < window) | (key < sinks))

    mask = window_mask(torch.arange(length, device=device)[None], window, sinks)
    blocks = mask.kv_num_blocks, mask.kv_indices
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length))


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
