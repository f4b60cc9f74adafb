"""Window and sinks by FlexAttention: one compiled kernel that visits only the blocks that the mask leaves."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .layout import DOCUMENT, Layout

SMALLEST_HEAD = 16
"""Narrower heads do not fit the kernel's matrix tiles."""


def has_flex(query: Tensor) -> bool:
    """Whether `flex_window` serves this tensor: on CUDA (on the CPU it has no backward), heads of a power of two."""
    dim = query.shape[-1]
    return query.is_cuda and dim >= SMALLEST_HEAD and dim & (dim - 1) == 0


def flex_window(query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, layout: Layout | None) -> Tensor:
    """As `window.window_attention`."""
    if layout is None:
        mask = _plain_mask(query.shape[2], window, sinks, str(query.device))
    else:
        mask = window_mask(layout.position.expand(len(query), -1), window, sinks)
    return _compiled()(query, key, value, block_mask=mask)


def window_mask(position: Tensor, window: int, sinks: int) -> BlockMask:
    """Mask of one softmax over window and sinks, for `position` int64 [B, T]; padding sees itself."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        here, there = position[batch, query], position[batch, key]
        distance = here - there
        sink = (there % DOCUMENT < sinks) & (distance < DOCUMENT // 2)
        real = (here >= 0) & (there >= 0) & (distance >= 0) & ((distance < window) | sink)
        return real | (query == key)

    batch, length = position.shape
    return create_block_mask(sees, batch, None, length, length, device=position.device)


@functools.lru_cache(maxsize=8)
def _plain_mask(length: int, window: int, sinks: int, device: str) -> BlockMask:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((query - key < window) | (key < sinks))

    return create_block_mask(sees, None, None, length, length, device=device)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
