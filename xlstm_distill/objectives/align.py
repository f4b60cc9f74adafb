"""Stage I (paper §3.2, Eq. 12): each mixer learns its layer's attention output from the frozen teacher's stream.

The layers are independent: the stream goes on with the teacher's own attention output, and each layer's backward runs
inside its forward, so memory does not grow with depth. Teacher and student share the projections, so one model holds
both.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xlstm_distill.model.layout import DOCUMENT, Layout
from xlstm_distill.model.mixer import HybridMixer, Projected


@dataclass
class LayerAlignment:
    """Put in place of a mixer's `mix`: sums ‖h − ĥ‖² and ‖h‖² over the real positions, and their gradient.

    Gradients are those of the plain sum Σ‖h − ĥ‖²: the caller divides by Σ‖h‖² of the *global* batch, which is known
    only after the forward.
    """

    train: bool
    """Whether to run the backward pass."""
    counts: bool = True
    """Whether the positions count: False adds zeros to the sums and nothing to the gradients."""
    clock: Callable[[str], AbstractContextManager[object]] = nullcontext
    """Counts the time of the mixer's `forward` and `backward` apart from the stream's."""
    error: Tensor | None = None
    """Σ‖h − ĥ‖² since the last `reset`, float32 scalar."""
    norm: Tensor | None = None
    """Σ‖h‖²."""

    def reset(self) -> None:
        """Start new sums."""
        self.error = self.norm = None

    def __call__(self, mixer: HybridMixer, projected: Projected, layout: Layout | None) -> Tensor:
        """The teacher's h [B, H, T, D], for the stream."""
        projected = projected.detach()
        target = teacher_attention(mixer, projected, layout)
        if not self.counts:
            self._add(target.new_zeros((), dtype=torch.float32), target[:0])
            return target
        with torch.set_grad_enabled(self.train):
            with self.clock("forward"):
                difference = target.float() - mixer.mix(projected, layout)
                error = _real(difference, layout).square().sum()
            if self.train:
                with self.clock("backward"):
                    error.backward()
        self._add(error.detach(), _real(target, layout))
        return target

    def _add(self, error: Tensor, target: Tensor) -> None:
        norm = target.float().square().sum()
        self.error = error if self.error is None else self.error + error
        self.norm = norm if self.norm is None else self.norm + norm


def _real(x_BHTD: Tensor, layout: Layout | None) -> Tensor:
    return x_BHTD if layout is None else x_BHTD.masked_fill(~layout.real[:, None, :, None], 0.0)


@torch.no_grad()
def teacher_attention(mixer: HybridMixer, projected: Projected, layout: Layout | None) -> Tensor:
    """h of Eq. 3 before W_o, [B, H, T, D]; on layers where the teacher has a window of its own, within that, and in a
    row whose documents are apart within the document."""
    query, key, value = projected.rotated_query, projected.rotated_key, projected.value
    native = mixer.native_window
    if layout is None and (native is None or native >= query.shape[2]):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=mixer.groups > 1)
    position = layout.position if layout else torch.arange(query.shape[2], device=query.device)[None]
    distance = position[:, None, :, None] - position[:, None, None, :]
    # Padding, at −1, sees itself and nobody sees it from farther than that.
    mask = (distance >= 0) & (distance < min(native or DOCUMENT // 2, DOCUMENT // 2))
    mask &= (position[:, None, None, :] >= 0) | (position[:, None, :, None] < 0)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=mixer.groups > 1)
