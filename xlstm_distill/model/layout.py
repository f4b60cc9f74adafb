"""Where each position of a batch stands: padding, and the documents of a packed row."""

from dataclasses import dataclass

import torch
from torch import Tensor

DOCUMENT = 1 << 32
"""Distance between the positions of two documents: more than any window, so that one number tells both."""


@dataclass(frozen=True)
class Layout:
    """Positions counted in *real* tokens, so that a padded row, or a document, computes what it would alone."""

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


def documents_of(position_ids: Tensor) -> Tensor:
    """Document numbers [B, T] of a packed row from positions [B, T] that start again with each document."""
    restart = torch.zeros_like(position_ids)
    restart[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).long()
    return restart.cumsum(1)
