"""Stage I (paper §3.2, Eq. 12): each mixer learns its layer's attention output from the frozen teacher's stream.

The layers are independent: the stream goes on with the teacher's own attention output, and each layer's backward runs
inside its forward, so memory does not grow with depth. Teacher and student share the projections, so one model holds
both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xlstm_distill.model.layout import Layout
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
        target = teacher_attention(mixer, projected)
        if not self.counts:
            self._add(target.new_zeros((), dtype=torch.float32), target[:0])
            return target
        with torch.set_grad_enabled(self.train):
            error = (target.float() - mixer.mix(projected, layout)).square().sum()
            if self.train:
                error.backward()
        self._add(error.detach(), target)
        return target

    def _add(self, error: Tensor, target: Tensor) -> None:
        norm = target.float().square().sum()
        self.error = error if self.error is None else self.error + error
        self.norm = norm if self.norm is None else self.norm + norm


@torch.no_grad()
def teacher_attention(mixer: HybridMixer, projected: Projected) -> Tensor:
    """h of Eq. 3 before W_o, [B, H, T, D]; on layers where the teacher has a window of its own, within that."""
    query, key, value = projected.rotated_query, projected.rotated_key, projected.value
    native = mixer.native_window
    if native is None or native >= query.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=mixer.groups > 1)
    index = torch.arange(query.shape[2], device=query.device)
    distance = index[:, None] - index
    mask = (distance >= 0) & (distance < native)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=mixer.groups > 1)
