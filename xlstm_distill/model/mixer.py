"""What stands in place of a teacher's attention module: mLSTM, window with sinks, the gate between them (Eq. 11)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import initialization as init

from .cache import HybridCache, HybridLayerCache
from .configuration import HybridConfig
from .kernel import Kernel, choose
from .layout import Layout
from .mlstm import mlstm_sums, normalise
from .window import Sinks, window_attention, window_attention_cached

PHI_FLOOR = 1e-12
"""Smallest value of a feature: without it φ(q)·φ(k) underflows to 0 / 0."""
NEW_PARAMETERS = ("query_map", "key_map", "input_gate", "forget_gate", "output_gate")
"""The mixer's own parameters; the rest comes from the teacher."""


class HybridMixer(nn.Module):
    """One layer's mixer. Takes over the projections (and norms) of the teacher's attention module under their names.

    Args:
        config: the student's configuration.
        attention: the teacher's attention module.
    """

    objective: Callable[["HybridMixer", "Projected", Layout | None], Tensor] | None = None
    """Stage I: called in place of `mix`, returns the stream's attention output [B, H, T, D]."""
    gate_hook: Callable[[int, Tensor, Tensor | None], None] | None = None
    """Called with the layer index, the output gate [B, H, T, 1] and which positions are real [B, T] (None: all)."""
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, config: HybridConfig, attention: nn.Module) -> None:
        super().__init__()
        base = config.base
        self.config = config
        self.layer_idx: int = attention.layer_idx  # type: ignore[assignment]
        self.heads = base.num_attention_heads
        self.groups = base.num_attention_heads // base.num_key_value_heads
        self.head_dim = config.head_dim
        self.native_window = config.native_window(self.layer_idx)
        self.window = config.layer_window(self.layer_idx)
        for name, child in attention.named_children():
            self.add_module(name, child)
        per_head = (self.heads, self.head_dim, self.head_dim)
        self.query_map = nn.Parameter(torch.empty(per_head))
        self.key_map = nn.Parameter(torch.empty(per_head))
        self.input_gate = nn.Linear(base.hidden_size, self.heads)
        self.forget_gate = nn.Linear(base.hidden_size, self.heads)
        width = base.hidden_size if config.gate_input == "hidden" else 3 * self.head_dim
        self.output_gate = HeadwiseLinear(self.heads, width, scale=self.head_dim**-0.5)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start of Stage I: φ = softmax, no input gate, slow forgetting, the window first (our choice).

        What `from_pretrained` loaded stays as it is: `init` knows it.
        """
        for matrix in (self.query_map, self.key_map):
            init.copy_(matrix, torch.eye(self.head_dim).expand_as(matrix))
        for gate in (self.input_gate, self.forget_gate, self.output_gate):
            init.zeros_(gate.weight)
        init.zeros_(self.input_gate.bias)
        first, last = self.config.forget_gate_bias
        init.copy_(self.forget_gate.bias, torch.linspace(first, last, self.heads))
        init.constant_(self.output_gate.bias, self.config.output_gate_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: HybridCache | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, hidden] → ([B, T, hidden], None), as the teacher's attention module.

        Args:
            hidden_states: the layer's input after the input norm.
            position_embeddings: cos and sin of RoPE, [B or 1, T, D].
            past_key_values: state to read and to advance.
            layout: padding and documents of the T positions; None: neither.
            **kwargs: what the decoder layer passes besides; not used.
        """
        projected = self.project(hidden_states, position_embeddings)
        layer = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        mixed = self.objective(self, projected, layout) if self.objective else self.mix(projected, layout, layer)
        return self.o_proj(mixed.transpose(1, 2).flatten(2).to(hidden_states.dtype)), None

    def project(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> "Projected":
        """The teacher's q, k, v of [B, T, hidden], before and after RoPE."""
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        query, key = self._norm("q_norm", query), self._norm("k_norm", key)
        value = self._heads(value)
        return Projected(hidden, query, key, value, *rope(query, key, *position_embeddings), *position_embeddings)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """QK-norm over the whole projection (Olmo) or per head (Qwen3), as wide as its weight."""
        norm = getattr(self, name, None)
        if norm is None:
            return self._heads(x)
        if norm.weight.numel() == self.head_dim:
            return norm(x.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        return self._heads(norm(x))

    def mix(self, projected: "Projected", layout: Layout | None, layer: HybridLayerCache | None = None) -> Tensor:
        """ĥ of Eq. 11 before W_o: [B, H, T, D]."""
        if not self.config.use_mlstm:
            return self._window_branch(projected, layout, layer)
        recurrent = self._mlstm_branch(projected, layout, layer)
        if not self.config.use_window:
            if layer is not None:
                layer.skip(projected.hidden.shape[1])
            return recurrent
        windowed = self._window_branch(projected, layout, layer)
        gate = self.gate(projected)
        if self.gate_hook:
            self.gate_hook(self.layer_idx, gate, layout.real if layout else None)
        return torch.lerp(windowed.float(), recurrent, gate)

    def gate(self, projected: "Projected") -> Tensor:
        """o of Eq. 11, one sigmoid scalar per head: float32 [B, H, T, 1]."""
        p = projected
        if self.config.gate_input == "hidden":
            return torch.sigmoid(self.output_gate(p.hidden[:, None]))
        query, key = (p.query, p.key) if self.config.gate_input == "qkv" else (p.rotated_query, p.rotated_key)
        return torch.sigmoid(self.output_gate(query, key, p.value))

    def _mlstm_branch(self, p: "Projected", layout: Layout | None, layer: HybridLayerCache | None) -> Tensor:
        state = layer.state if layer is not None else None
        gates = self._log_gates(p.hidden, layout)
        rotated = self.config.feature_rope == "before"
        query = self.feature_map(p.rotated_query if rotated else p.query, self.query_map)
        key = self.feature_map(self._repeat(p.rotated_key if rotated else p.key), self.key_map)
        value = self._repeat(p.value)
        if self.config.feature_rope == "after":
            out, state = self._rotated_features(p, query, key, value, gates, state)
        else:
            out, state = self.kernel_on(query.device)(query, key, value, *gates, state, self.config.chunk)
        if layer is not None:
            layer.state = state
        return out

    def _log_gates(self, hidden: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """log i and log f, float32 [B, H, T]: padding adds and forgets nothing, a new document forgets all."""
        hidden = hidden.to(self.input_gate.weight.dtype)  # a strategy may keep the mixers' parameters in float32
        if self.config.use_gates:
            cap = self.config.input_gate_soft_cap
            log_input = cap * torch.tanh(self.input_gate(hidden).float() / cap).transpose(1, 2)
            log_forget = F.logsigmoid(self.forget_gate(hidden).float()).transpose(1, 2)
        else:
            log_input = log_forget = hidden.new_zeros(hidden.shape[0], self.heads, hidden.shape[1], dtype=torch.float32)
        if layout is not None:
            padded = ~layout.real[:, None]
            log_input = log_input.masked_fill(padded, -torch.inf)
            log_forget = log_forget.masked_fill(padded, 0.0)
            if layout.split:
                log_forget = log_forget.masked_fill((layout.ordinal == 0)[:, None], -torch.inf)
        return log_input, log_forget

    def _rotated_features(
        self,
        p: "Projected",
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: tuple[Tensor, Tensor],
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """RoPE on φ(q), φ(k) in the numerator only, so that the denominator stays positive (RoFormer, Eq. 19)."""
        signs = [x.unflatten(-1, (-1, self.head_dim)).movedim(3, 0) for x in (query, key)]  # hedgehog has two
        turned_query, turned_key = (x.movedim(0, 3).flatten(3) for x in rope(signs[0], signs[1], p.cos, p.sin))
        log_input, log_forget = gates
        chunk, norm = self.config.chunk, None if state is None else state[..., -1:]
        above, _, last = mlstm_sums(turned_query, turned_key, value, log_input, log_forget, state, chunk)
        _, below, last_norm = mlstm_sums(query, key, value[..., :0], log_input, log_forget, norm, chunk)
        return normalise(above, below), torch.cat([last[..., :-1], last_norm], -1)

    def kernel_on(self, device: torch.device) -> Kernel:
        """What computes the mLSTM there: `config.kernel`; with RoPE after φ the torch form, the only one that can.

        Raises:
            ValueError: it cannot run there.
        """
        return choose("torch" if self.config.feature_rope == "after" else self.config.kernel, device)

    def feature_map(self, x: Tensor, matrix: Tensor) -> Tensor:
        """φ, float32: softmax(x W) over the features, or hedgehog's two signs of it (paper §2)."""
        scores = (x @ matrix.to(x.dtype)).float()
        if self.config.feature_map == "hedgehog":
            return torch.cat([_Features.apply(scores), _Features.apply(-scores)], -1) * 0.5
        return _Features.apply(scores)  # type: ignore[no-untyped-call, no-any-return]

    def _window_branch(self, p: "Projected", layout: Layout | None, layer: HybridLayerCache | None) -> Tensor:
        query, key, value = p.rotated_query, p.rotated_key, p.value
        fresh = layer is None or layer.cumulative_length == 0
        if layer is not None:
            if not layer.is_initialized:
                layer.lazy_initialization(key, value)
            positions = layer.next_positions(query.shape[2], layout)
            tape = None if fresh or query.shape[2] == 1 else layer.tape(key, value, positions)
            layer.update(key, value, positions)
        if layer is None or fresh:
            return window_attention(
                query, self._repeat(key), self._repeat(value), self.window, self.config.sinks, layout
            )
        if tape is None:
            seen = layer.visible(positions)[:, None, None] | (positions < 0)[:, None, :, None]
            keys, values = layer.keys, layer.values
            assert keys is not None
            assert values is not None
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=self.groups > 1)
        keys, values = self._repeat(tape.keys), self._repeat(tape.values)
        sink_keys, sink_values = (self._repeat(x)[:, :, None] for x in tape.sinks)
        sinks = Sinks(sink_keys, sink_values, tape.sink_positions[:, None])
        return window_attention_cached(query, keys, values, positions, tape.positions, sinks, self.window)

    def _repeat(self, x_BKTD: Tensor) -> Tensor:
        return x_BKTD.repeat_interleave(self.groups, 1) if self.groups > 1 else x_BKTD


class _Features(torch.autograd.Function):
    """Softmax over the last axis, at least `PHI_FLOOR`. The gradient is the softmax's; the floor is 1e-12 of it."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        features = scores.softmax(-1).clamp_min_(PHI_FLOOR)
        ctx.save_for_backward(features)
        return features

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(grad, features, -1, features.dtype)


class HeadwiseLinear(nn.Module):
    """One linear unit per head: float32 [B, H, T, 1] of one or more [B, H or fewer, T, ·], joined, times `scale`.

    Queries and keys are large (a head's ‖x‖₁ is in the hundreds): unscaled, one AdamW step at Stage I's learning rate
    moves the gate's pre-activation by several units, and heads shut for good. The functions it can be are the same (our
    choice; the paper says nothing of it).
    """

    def __init__(self, heads: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, *inputs: Tensor) -> Tensor:
        weights = (self.scale * self.weight).split([x.shape[-1] for x in inputs], 1)
        total = self.bias.float()[:, None]
        for x, weight in zip(inputs, weights, strict=True):
            # [H', width, G]: G heads share an input.
            per_input = weight.to(x.dtype).unflatten(0, (x.shape[1], -1)).mT
            total = total + (x @ per_input).float().mT.flatten(1, 2)
        return total[..., None]


class Projected(NamedTuple):
    """What a layer's attention sees."""

    hidden: Tensor
    """[B, T, hidden]"""
    query: Tensor
    """[B, H, T, D]"""
    key: Tensor
    """[B, H_kv, T, D]"""
    value: Tensor
    """[B, H_kv, T, D]"""
    rotated_query: Tensor
    rotated_key: Tensor
    cos: Tensor
    """[B or 1, T, D]"""
    sin: Tensor

    def detach(self) -> "Projected":
        """The same values outside the graph."""
        return Projected(*(x.detach() for x in self))


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of [B, H, T, D] with cos and sin [B or 1, T, D] (halves, as in Llama)."""
    cos, sin = cos[:, None], sin[:, None]
    return tuple((x * cos + _rotate_half(x) * sin).to(x.dtype) for x in (query, key))  # type: ignore[return-value]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
