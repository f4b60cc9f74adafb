"""Where each position of a batch stands: padding, and the documents of a packed row."""

from typing import NamedTuple

import torch
from torch import Tensor

DOCUMENT = 1 << 32
"""Distance between the positions of two documents: more than any window, so that one number tells both."""


class Layout(NamedTuple):
    """Positions counted in *real* tokens, so that a padded row, or a document, computes what it would alone.

    A tuple, because hooks that move a layer's inputs to its device look into tuples.
    """

    position: Tensor
    """int64 [B, T]: number of the document · `DOCUMENT` + index among its real tokens; −1 for padding."""
    split: bool
    """Whether rows hold documents that do not see each other."""

    @property
    def real(self) -> Tensor:
        """[B, T], False for padding."""
        return self.position >= 0

    @property
    def ordinal(self) -> Tensor:
        """[B, T], index among the real tokens of the row, or of the document; −1 for padding."""
        return torch.where(self.real, self.position % DOCUMENT, -1)


def make_layout(padding_mask: Tensor | None, documents: Tensor | None, length: int) -> Layout | None:
    """Layout of the last `length` positions; None where all are real and of one document.

    Args:
        padding_mask: [B, S ≥ T], 0 where padding, or None: all real.
        documents: [B, T] numbers that change where a new document starts, or None: one document per row.
        length: T.
    """
    if padding_mask is None and documents is None:
        return None
    if padding_mask is None:
        assert documents is not None
        real = torch.ones_like(documents, dtype=torch.bool)
    else:
        real = padding_mask[:, -length:].to(torch.bool)
    count = real.long().cumsum(1)
    if documents is None:
        return Layout(torch.where(real, count - 1, -1), split=False)
    new = torch.ones_like(real)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    before = torch.where(new, count - real.long(), -1).cummax(1).values  # real tokens ahead of this document
    position = (new.long().cumsum(1) - 1) * DOCUMENT + count - 1 - before
    return Layout(torch.where(real, position, -1), split=True)


def has_holes(padding_mask: Tensor, layout: Layout) -> bool:
    """Whether padding stands between tokens of one row, or of one document; `padding_mask` as in `make_layout`."""
    real = padding_mask.bool()
    begins = real[:, 1:] & ~real[:, :-1]
    inside = layout.ordinal[:, 1:] > 0 if layout.split else real.long().cumsum(1)[:, 1:] > 1
    return bool((begins & inside).any())


def documents_of(position_ids: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Document numbers [B, T] of a packed row from positions [B or 1, T] that start again with each document.

    A token starts one if its position does not follow that of the last token before it, padding (0 in `padding_mask`
    [B, S ≥ T]) not counted.
    """
    before, follows = position_ids[:, :-1], torch.ones_like(position_ids[:, 1:], dtype=torch.bool)
    if padding_mask is not None:
        real = padding_mask[:, -position_ids.shape[1] :].bool()
        position_ids = position_ids.expand_as(real)
        index = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, index, -1).cummax(1).values[:, :-1]
        before, follows = position_ids.gather(1, last.clamp_min(0)), real[:, 1:] & (last >= 0)
    restart = torch.zeros_like(position_ids)
    restart[:, 1:] = (follows & (position_ids[:, 1:] != before + 1)).long()
    return restart.cumsum(1)
