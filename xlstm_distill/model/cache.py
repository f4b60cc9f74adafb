"""The student's state while it writes: per layer the mLSTM state, and keys and values of sinks and window.

Its size does not depend on how much was read. Per row, with b bytes per key or value (`HybridConfig.state_bytes`):

    Σ over layers   4·H·D_φ·(D + 1)  +  (2·b·H_kv·D + 8)·(sinks + W)  +  8

D_φ is D, or 2·D for hedgehog; a branch that is switched off takes nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .layout import Layout


class Tape(NamedTuple):
    """What new queries may read, in order: the window before them, then their own keys; and the sinks."""

    keys: Tensor
    """[B, H_kv, W − 1 + T, D]"""
    values: Tensor
    positions: Tensor
    """[B, W − 1 + T], −1 where nothing is"""
    sinks: tuple[Tensor, Tensor]
    """keys, values [B, H_kv, n, D]"""
    sink_positions: Tensor
    """[B, n]"""


class StateLayer(CacheLayerMixin):
    """State of one layer, of constant size: rows can be taken and repeated, positions cannot be taken back."""

    is_sliding = False
    is_compileable = False
    tensors: tuple[str, ...] = ()
    """Names of attributes, each None or a tensor whose first axis is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

    def skip(self, length: int) -> None:
        """Count `length` positions that were read."""
        self.cumulative_length += length

    def get_seq_length(self) -> int:
        """Positions read so far, padding included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the 2-D padding mask."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, max_length: int) -> None:
        """Refused: a recurrent state cannot be rolled back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a recurrent state cannot take back tokens that it has read: assisted (speculative) decoding is off; "
            "generate without assistant_model, prompt_lookup_num_tokens and the like"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` (beam search)."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._rows(lambda x: x[indices])

    def held(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return {name: x for name in self.tensors if (x := getattr(self, name)) is not None}

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, x in self.held().items():
            setattr(self, name, change(x))

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in self.held().values())


class StateCache(Cache):
    """`past_key_values` that do not grow with what was read."""

    layers: list[StateLayer]  # type: ignore[assignment]

    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes() for layer in self.layers)


class HybridLayerCache(StateLayer):
    """State of one layer. `keys`, `values` hold the sinks, then the last W positions as a ring."""

    tensors = ("state", "keys", "values", "positions", "seen")

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.sinks_full = sinks == 0
        self.state: Tensor | None = None
        """(S, z) of the mLSTM, float32 [B, H, D_φ, D + 1]."""
        self.positions: Tensor
        """[B, sinks + W] index of each slot's token among the real ones of its row, −1 where nothing is."""
        self.seen: Tensor
        """[B] real tokens read."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty slots of the shapes of `key_states` [B, H_kv, T, D], `value_states` [B, H_kv, T, D]."""
        batch, heads, _, dim = key_states.shape
        slots = self.sinks + self.window
        self.keys = key_states.new_zeros(batch, heads, slots, dim)
        self.values = value_states.new_zeros(batch, heads, slots, value_states.shape[-1])
        self.positions = torch.full((batch, slots), -1, device=key_states.device)
        self.seen = self.positions.new_zeros(batch)
        self.is_initialized = True

    def next_positions(self, length: int, layout: Layout | None) -> Tensor:
        """Indices [B, T] of `length` new positions among the real ones of their rows, −1 for padding."""
        if layout is None:
            return self.seen[:, None] + torch.arange(length, device=self.seen.device)
        return torch.where(layout.real, self.seen[:, None] + layout.ordinal, -1)

    def tape(self, key_states: Tensor, value_states: Tensor, positions: Tensor) -> Tape:
        """Window and new positions in order; to be taken before `update`."""
        keys, values, before = self._unrolled(self.keys), self._unrolled(self.values), self._unrolled(self.positions)
        sinks = self.keys[:, :, : self.sinks], self.values[:, :, : self.sinks]  # type: ignore[index]
        return Tape(
            torch.cat([keys, key_states], 2),
            torch.cat([values, value_states], 2),
            torch.cat([before, positions], 1),
            sinks,
            self.positions[:, : self.sinks],
        )

    def _unrolled(self, slots: Tensor | None) -> Tensor:
        """The last W − 1 of the ring, oldest first; the slots are the second to last axis, or the last of positions."""
        assert slots is not None
        axis = min(2, slots.ndim - 1)
        ring = slots.narrow(axis, self.sinks, self.window)
        return ring.roll(-(self.cumulative_length % self.window), axis).narrow(axis, 1, self.window - 1)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keep what later positions will read of T new ones at `positions` [B, T]; keys and values of all slots."""
        assert self.keys is not None
        assert self.values is not None
        length = key_states.shape[2]
        self._keep_sinks(key_states, value_states, positions)
        kept = min(length, self.window)
        first = (self.cumulative_length + length - kept) % self.window
        for slots, new in ((self.keys, key_states), (self.values, value_states), (self.positions, positions)):
            axis = min(2, new.ndim - 1)
            ring, new = slots.narrow(axis, self.sinks, self.window), new.narrow(axis, length - kept, kept)
            tail = min(kept, self.window - first)  # up to the ring's end, then from its start
            ring.narrow(axis, first, tail).copy_(new.narrow(axis, 0, tail))
            ring.narrow(axis, 0, kept - tail).copy_(new.narrow(axis, tail, kept - tail))
        self.seen = torch.maximum(self.seen, positions.amax(1) + 1)
        self.cumulative_length += length
        return self.keys, self.values

    def _keep_sinks(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        if self.sinks_full:
            return
        assert self.keys is not None
        assert self.values is not None
        rows = torch.arange(len(positions), device=positions.device)
        for n in range(self.sinks):
            here = positions == n  # at most one position per row
            found, index = here.any(1), here.int().argmax(1)
            keep = found[:, None, None]
            self.keys[:, :, n] = torch.where(keep, keys[rows, :, index], self.keys[:, :, n])
            self.values[:, :, n] = torch.where(keep, values[rows, :, index], self.values[:, :, n])
            self.positions[:, n] = torch.where(found, n, self.positions[:, n])
        self.sinks_full = bool((self.positions[:, : self.sinks] >= 0).all())

    def visible(self, positions: Tensor) -> Tensor:
        """Which slots a query at `positions` [B, 1] sees after its own `update`: bool [B, sinks + W]."""
        distance = positions - self.positions
        old_sink = torch.arange(self.positions.shape[1], device=positions.device) < self.sinks
        return (self.positions >= 0) & torch.where(old_sink, distance >= self.window, distance < self.window)

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.cumulative_length, self.state = False, 0, None
        self.sinks_full = self.sinks == 0

    def held(self) -> dict[str, Tensor]:
        """No mLSTM state without that branch, no slots before `lazy_initialization`."""
        return super().held() if self.is_initialized else {"state": self.state} if self.state is not None else {}


class HybridCache(StateCache):
    """`past_key_values` of a hybrid xLSTM.

    Args:
        windows: W of each layer.
        sinks: sink positions.
    """

    layers: list[HybridLayerCache]  # type: ignore[assignment]

    def __init__(self, windows: list[int], sinks: int) -> None:
        super().__init__(layers=[HybridLayerCache(window, sinks) for window in windows])
