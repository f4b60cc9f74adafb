"""The student's state while it writes: per layer the mLSTM state, the window's and the sinks' keys and values.

Its size does not depend on how much was read: per layer and row
`4·H·D·(D_v + 1) + 2·b·H_kv·D·(W − 1 + sinks)` bytes for keys and values of b bytes each, and W + sinks ordinals.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class HybridLayerCache(CacheLayerMixin):
    """State of one layer. `keys`, `values` are the last W − 1 positions, right-aligned."""

    is_sliding = False
    tensors = ("state", "keys", "values", "positions", "sink_keys", "sink_values", "sink_positions", "seen")

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.cumulative_length = 0
        self.state: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty window and sinks of the shapes of `key_states` [B, H_kv, T, D], `value_states` [B, H_kv, T, E]."""
        batch, heads, _, dim = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.window - 1, dim)
        self.values = value_states.new_zeros(batch, heads, self.window - 1, value_states.shape[-1])
        self.sink_keys = key_states.new_zeros(batch, heads, self.sinks, dim)
        self.sink_values = value_states.new_zeros(batch, heads, self.sinks, value_states.shape[-1])
        absent = torch.full((batch, self.window - 1), -1, device=key_states.device)
        self.positions, self.sink_positions = absent, absent.new_full((batch, self.sinks), -1)
        self.seen = absent.new_zeros(batch)
        self.is_initialized = True

    def ordinals(self, padding_mask: Tensor | None, like: Tensor) -> Tensor:
        """Ordinals [B, T] of the new positions of `like` [B, H, T, D] among the real ones; −1 for padding."""
        batch, length = like.shape[0], like.shape[2]
        if padding_mask is None:
            return self.seen[:, None] + torch.arange(length, device=like.device)
        real = padding_mask[:, -length:].to(torch.bool).expand(batch, -1)
        return torch.where(real, self.seen[:, None] + real.long().cumsum(1) - 1, -1)

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append positions; return what the new queries may read: [B, H_kv, W − 1 + T, D]. Sinks are kept besides."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        self._keep_sinks(key_states, value_states, positions)
        tape = torch.cat([self.positions, positions], 1)
        self.window_positions = tape
        first = tape.shape[1] - (self.window - 1)
        # Clones: a view would keep the whole prefix alive.
        self.keys, self.values, self.positions = (
            keys[:, :, first:].clone(),
            values[:, :, first:].clone(),
            tape[:, first:],
        )
        self.seen = torch.maximum(self.seen, positions.amax(1) + 1)
        self.cumulative_length += key_states.shape[2]
        return keys, values

    def _keep_sinks(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        for n in range(self.sinks):
            here = positions == n  # at most one position per row
            found, index = here.any(1), here.int().argmax(1)
            rows = torch.arange(len(index), device=index.device)
            keep = found[:, None, None]
            self.sink_keys[:, :, n] = torch.where(keep, keys[rows, :, index], self.sink_keys[:, :, n])
            self.sink_values[:, :, n] = torch.where(keep, values[rows, :, index], self.sink_values[:, :, n])
            self.sink_positions[:, n] = torch.where(found, n, self.sink_positions[:, n])

    def skip(self, length: int) -> None:
        """Count `length` positions that only the mLSTM reads (a student without a window)."""
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

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.cumulative_length, self.state = False, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` (beam search)."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._rows(lambda x: x[indices])

    def _held(self) -> dict[str, Tensor]:
        """The tensors there are: no mLSTM state without that branch, no window before `lazy_initialization`."""
        names = self.tensors if self.is_initialized else ("state",)
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, x in self._held().items():
            setattr(self, name, change(x))

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in self._held().values())


class HybridCache(Cache):
    """`past_key_values` of a hybrid xLSTM: constant in the length of what was read.

    Args:
        windows: W of each layer.
        sinks: sink positions.
    """

    layers: list[HybridLayerCache]  # type: ignore[assignment]

    def __init__(self, windows: list[int], sinks: int) -> None:
        super().__init__(layers=[HybridLayerCache(window, sinks) for window in windows])

    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes() for layer in self.layers)
