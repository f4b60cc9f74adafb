"""The blocks of a Distil-xLSTM: those of the `xlstm` package (Beck et al. 2024, arXiv 2405.04517) with a state, padding
and float32 cells. Parameters, their names and their start are the package's: its own blocks compute the same.

Its CUDA kernel is not used: it is compiled at run time for one batch size, computes in bfloat16 and orders the
recurrent weights otherwise. Its torch form of the sLSTM copies all states once per step in the backward pass; ours does
not. The mLSTM is the package's torch form, of which autograd takes all gradients, that through the normaliser included.

H: width, N: heads, D: width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache import StateLayer
from .layout import Layout
from .xlstm_package import (
    FeedForwardConfig,
    chunkwise_simple,
    mLSTMCell,
    mLSTMLayer,
    mLSTMLayerConfig,
    parallel_stabilized_simple,
    sLSTMCell_vanilla,
    sLSTMLayer,
    sLSTMLayerConfig,
    xLSTMBlock,
    xLSTMBlockConfig,
)

SEGMENT = 512
"""Positions of which the mLSTM computes all pairs; longer sequences go segment by segment."""
State = dict[str, Tensor]


class SLSTMCell(sLSTMCell_vanilla):
    """The recurrence, one step after another, in float32."""

    def forward(self, gates: Tensor, state: State, real: Tensor | None) -> tuple[Tensor, State]:
        """[B, N, T, D] from the gates' inputs [B, T, 4 H].

        The stabiliser m scales c and n alike and leaves y as it is, so no gradient goes through it. It starts at −∞:
        at the first token the memory is that token, whatever the forget gate says.

        Args:
            gates: input, forget, cell and output gate side by side.
            state: y, c, n, m [B, N, D], or empty.
            real: [B, T], False for padding, which leaves the state as it is; None: all real.
        """
        (batch, length), heads, dim = gates.shape[:2], self.config.num_heads, self.config.head_dim
        with torch.autocast(gates.device.type, enabled=False):
            inputs = (gates.float() + self._bias_.float()).view(batch, length, 4, heads, dim)
            inputs_TNBG = inputs.permute(1, 3, 0, 2, 4).reshape(length, heads, batch, 4 * dim)
            recurrent_NDG = self._recurrent_kernel_.float().transpose(1, 2)
            zeros = inputs.new_zeros(heads, batch, dim)
            start = {"y": zeros, "c": zeros, "n": zeros, "m": torch.full_like(zeros, -torch.inf)}
            y, c, n, m = (state[name].transpose(0, 1) if state else start[name] for name in start)
            outputs = []
            for t, step in enumerate(inputs_TNBG.unbind()):
                before = y, c, n, m
                i, f, z, o = torch.baddbmm(step, y, recurrent_NDG).view(heads, batch, 4, dim).unbind(2)
                kept = logsigmoid(f) + m
                m = torch.maximum(i, kept).detach()
                i, f = (i - m).exp(), (kept - m).exp()
                c, n = torch.addcmul(f * c, i, z.tanh()), torch.addcmul(i, f, n)
                y = o.sigmoid() * c / n
                if real is not None:
                    here = real[None, :, t, None]
                    y, c, n, m = (torch.where(here, x, x0) for x, x0 in zip((y, c, n, m), before, strict=True))
                outputs.append(y)
            after = {name: x.transpose(0, 1) for name, x in zip(start, (y, c, n, m), strict=True)}
        return torch.stack(outputs, 2).transpose(0, 1), after


class SLSTMLayer(sLSTMLayer):
    """Convolution, gates, recurrence, norm per head."""

    def __init__(self, config: sLSTMLayerConfig) -> None:
        super().__init__(config)
        self.slstm_cell = SLSTMCell(config)

    def forward(self, x: Tensor, state: State | None, real: Tensor | None) -> tuple[Tensor, State]:
        """[B, T, H] from [B, T, H], 0 where padding; `state`: None: nobody asks for it."""
        state = dict(state or {})
        convolved, conv = self.conv1d(x, state.pop("conv", None), return_last_state=True)
        convolved = self.conv_act_fn(convolved)
        # The package's order: what it calls the forget gate's weights feeds the cell's input gate.
        gates = [self.fgate(convolved), self.igate(convolved), self.zgate(x), self.ogate(x)]
        y, state = self.slstm_cell(torch.cat(gates, -1), state, real)
        y = self.group_norm(y.to(gates[0].dtype))
        return y.transpose(1, 2).reshape(x.shape), {"conv": conv, **state}


class MLSTMCell(mLSTMCell):
    """The matrix memory, in float32: all pairs of positions, or segments with a state between them."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, real: Tensor | None
    ) -> tuple[Tensor, State]:
        """[B, T, H] from q, k, v [B, T, H].

        Args:
            q: queries.
            k: keys.
            v: values.
            state: `memory` [B, N, D, D], `norm` [B, N, D] and `scale` [B, N]; empty: at the start; None: at the start,
                and nobody asks for the state after.
            real: [B, T], False for padding, which the memory does not take; None: all real.
        """
        together = torch.cat([q, k, v], -1)
        i, f = (gate(together).float().transpose(1, 2) for gate in (self.igate, self.fgate))
        k = k if real is None else k.masked_fill(~real[..., None], 0.0)
        heads = (*q.shape[:2], self.config.num_heads, -1)
        after: State = {}
        with torch.autocast(q.device.type, enabled=False):
            parts = [x.float().view(heads).transpose(1, 2) for x in (q, k, v)]
            if state is None and q.shape[1] <= SEGMENT:
                h = parallel_stabilized_simple(*parts, i[..., None], f[..., None])
            else:
                h, after = _segments([*parts, i, f], state or {})
        h = self.outnorm(h.to(q.dtype))
        return h.transpose(1, 2).reshape(q.shape), after


def _segments(inputs: list[Tensor], state: State) -> tuple[Tensor, State]:
    """The package's chunkwise form with one chunk per segment, whose last may be shorter."""
    found = []
    for parts in zip(*(x.split(SEGMENT, 2) for x in inputs), strict=True):
        q, k, v, i, f = (x.contiguous() for x in parts)
        h, (memory, norm, scale) = chunkwise_simple(
            q, k, v, i, f, state.get("memory"), state.get("norm"), state.get("scale"), q.shape[2], True
        )
        found.append(h)
        state = {"memory": memory, "norm": norm, "scale": scale.flatten(1)}
    return torch.cat(found, 2), state


class MLSTMLayer(mLSTMLayer):
    """Up-projection, convolution, cell, gated by the other half, down-projection."""

    mlstm_cell: Any

    def __init__(self, config: mLSTMLayerConfig) -> None:
        super().__init__(config)
        self.mlstm_cell = MLSTMCell(self.mlstm_cell.config)
        self.mlstm_cell.causal_mask = None  # a buffer that no checkpoint holds, and that is not read here

    def forward(self, x: Tensor, state: State | None, real: Tensor | None) -> tuple[Tensor, State]:
        """[B, T, H] from [B, T, H], 0 where padding; `state`: None: nobody asks for it."""
        inner, z = self.proj_up(x).chunk(2, -1)
        convolved, conv = self.conv1d(inner, (state or {}).get("conv"), return_last_state=True)
        convolved = self.conv_act_fn(convolved)
        cell = None if state is None else {name: value for name, value in state.items() if name != "conv"}
        h, cell = self.mlstm_cell(self.q_proj(convolved), self.k_proj(convolved), self.v_proj(inner), cell, real)
        h = (h + self.learnable_skip * convolved) * self.ogate_act_fn(z)
        return self.proj_down(h), {"conv": conv, **cell}


class BlockState(StateLayer):
    """State of one block: of its convolution, and of its cell (names as in the cells)."""

    tensors = ("conv", "y", "c", "n", "m", "memory", "norm", "scale")
    conv = y = c = n = m = memory = norm = scale = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the block makes what it keeps."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Nothing: there are no keys and values."""
        return key_states, value_states

    def keep(self, state: State, length: int) -> None:
        """Take `state` as the one after `length` more positions."""
        for name, value in state.items():
            setattr(self, name, value.clone())  # not a view, which would hold all that was read
        self.skip(length)

    def reset(self) -> None:
        """Forget everything."""
        self.cumulative_length = 0
        for name in self.tensors:
            setattr(self, name, None)


class Block(GradientCheckpointingLayer, xLSTMBlock):
    """The package's residual block: norm and layer, and after an sLSTM norm and gated MLP."""

    xlstm: Any
    xlstm_norm: Any
    ffn: Any
    ffn_norm: Any

    def __init__(self, config: xLSTMBlockConfig) -> None:
        super().__init__(config)
        self.xlstm = SLSTMLayer(config.slstm) if config.slstm is not None else MLSTMLayer(config.mlstm)

    def forward(self, x: Tensor, layout: Layout | None = None, past_key_values: BlockState | None = None) -> Tensor:
        """[B, T, H] from [B, T, H]; the state is read and kept in `past_key_values`."""
        real = None if layout is None else layout.real
        inner = self.xlstm_norm(x)
        inner = inner if real is None else inner.masked_fill(~real[..., None], 0.0)
        inner, after = self.xlstm(inner, None if past_key_values is None else past_key_values.held(), real)
        if past_key_values is not None:
            past_key_values.keep(after, x.shape[1])
        x = x + inner
        return x if self.ffn is None else x + self.ffn(self.ffn_norm(x))

    def reset_parameters(self) -> None:
        """The package's start; it leaves the convolution to its constructor."""
        super().reset_parameters()
        self.xlstm.conv1d.reset_parameters()


def make_blocks(
    width: int, count: int, *, heads: int, conv_kernel: int, qkv_block: int, mlstm_factor: float, ffn_factor: float
) -> list[Block]:
    """`count` blocks, sLSTM and mLSTM by turns, an sLSTM first.

    Args:
        width: H.
        count: number of blocks; some of the start depends on a block's place among them.
        heads: N, of both cells.
        conv_kernel: positions of the causal convolutions.
        qkv_block: features among which the mLSTM's projections of q, k and v mix.
        mlstm_factor: inner width of the mLSTM over H.
        ffn_factor: inner width of the sLSTM's MLP over H.
    """
    made = []
    for number in range(count):
        place = {"_num_blocks": count, "_block_idx": number}
        if number % 2 == 0:
            slstm = sLSTMLayerConfig(
                embedding_dim=width, num_heads=heads, conv1d_kernel_size=conv_kernel, backend="vanilla"
            )
            mlp = FeedForwardConfig(proj_factor=ffn_factor)
            made.append(Block(xLSTMBlockConfig(slstm=slstm, feedforward=mlp, **place)))
        else:
            mlstm = mLSTMLayerConfig(
                embedding_dim=width, num_heads=heads, conv1d_kernel_size=conv_kernel, qkv_proj_blocksize=qkv_block,
                proj_factor=mlstm_factor, context_length=1,
            )  # fmt: skip
            made.append(Block(xLSTMBlockConfig(mlstm=mlstm, **place)))
    return made
