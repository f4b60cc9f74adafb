"""What stands in place of a teacher's attention module: mLSTM, window with sinks, the gate between them (Eq. 11)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache import HybridCache, HybridLayerCache
from .configuration import HybridConfig
from .mlstm import mlstm
from .window import window_attention

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

    objective: Callable[["HybridMixer", "Projected", Tensor | None], Tensor] | None = None
    """Stage I: called in place of `mix`, returns the stream's attention output [B, H, T, D]."""
    gate_hook: Callable[[int, Tensor], None] | None = None
    """Called with the layer index and the output gate [B, H, T, 1] of every forward."""
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
        self.head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        self.native_window = config.native_window(self.layer_idx)
        self.window = min(config.window, self.native_window or config.window)
        for name, child in attention.named_children():
            self.add_module(name, child)
        per_head = (self.heads, self.head_dim, self.head_dim)
        self.query_map = nn.Parameter(torch.empty(per_head))
        self.key_map = nn.Parameter(torch.empty(per_head))
        self.input_gate = nn.Linear(base.hidden_size, self.heads)
        self.forget_gate = nn.Linear(base.hidden_size, self.heads)
        self.output_gate = HeadwiseLinear(self.heads, 3 * self.head_dim, scale=self.head_dim**-0.5)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start of Stage I: φ = softmax, no input gate, slow forgetting, the window first (defaults of §9)."""
        for matrix in (self.query_map, self.key_map):
            matrix.copy_(torch.eye(self.head_dim).expand_as(matrix))
        for gate in (self.input_gate, self.forget_gate, self.output_gate):
            gate.weight.zero_()
        self.input_gate.bias.zero_()
        self.forget_gate.bias.copy_(torch.linspace(3.0, 6.0, self.heads))
        self.output_gate.bias.fill_(self.config.output_gate_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: HybridCache | None = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, hidden] → ([B, T, hidden], None), as the teacher's attention module.

        Args:
            hidden_states: the layer's input after the input norm.
            position_embeddings: cos and sin of RoPE, [B or 1, T, D].
            past_key_values: state to read and to advance.
            padding_mask: [B, past + T], 0 where padding; None: all real.
            **kwargs: what the decoder layer passes besides; not used.
        """
        projected = self.project(hidden_states, position_embeddings)
        layer = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        mixed = (
            self.objective(self, projected, padding_mask)
            if self.objective
            else self.mix(projected, padding_mask, layer)
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2).to(hidden_states.dtype)), None

    def project(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> "Projected":
        """The teacher's q, k, v of [B, T, hidden], before and after RoPE."""
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        query, key = self._norm("q_norm", query), self._norm("k_norm", key)
        value = self._heads(value)
        return Projected(hidden, query, key, value, *rope(query, key, *position_embeddings))

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

    def mix(self, projected: "Projected", padding_mask: Tensor | None, layer: HybridLayerCache | None = None) -> Tensor:
        """ĥ of Eq. 11 before W_o: [B, H, T, D]."""
        if not self.config.use_mlstm:
            return self._window_branch(projected, padding_mask, layer)
        recurrent = self._mlstm_branch(projected, padding_mask, layer)
        if not self.config.use_window:
            if layer is not None:
                layer.skip(projected.hidden.shape[1])
            return recurrent
        windowed = self._window_branch(projected, padding_mask, layer)
        gate = self.gate(projected)
        if self.gate_hook:
            self.gate_hook(self.layer_idx, gate)
        return gate * recurrent + (1 - gate) * windowed.float()

    def gate(self, projected: "Projected") -> Tensor:
        """o of Eq. 11, one sigmoid scalar per head from [q, k, v] before RoPE: float32 [B, H, T, 1]."""
        inputs = torch.cat([projected.query, self._repeat(projected.key), self._repeat(projected.value)], -1)
        return torch.sigmoid(self.output_gate(inputs).float())

    def _mlstm_branch(self, p: "Projected", padding_mask: Tensor | None, layer: HybridLayerCache | None) -> Tensor:
        cap = self.config.input_gate_soft_cap
        hidden = p.hidden.to(self.input_gate.weight.dtype)  # a strategy may keep the mixers' parameters in float32
        log_input = cap * torch.tanh(self.input_gate(hidden).float() / cap).transpose(1, 2)  # [B, H, T]
        log_forget = F.logsigmoid(self.forget_gate(hidden).float()).transpose(1, 2)
        if padding_mask is not None:
            padded = ~padding_mask[:, None, -p.hidden.shape[1] :].to(torch.bool)
            log_input = log_input.masked_fill(padded, -torch.inf)
            log_forget = log_forget.masked_fill(padded, 0.0)
        out, state = mlstm(
            self.feature_map(p.rotated_query, self.query_map),
            self.feature_map(self._repeat(p.rotated_key), self.key_map),
            self._repeat(p.value),
            log_input,
            log_forget,
            layer.state if layer is not None else None,
            self.config.chunk,
        )
        if layer is not None:
            layer.state = state
        return out

    def feature_map(self, x: Tensor, matrix: Tensor) -> Tensor:
        """φ, float32: softmax(x W) over the features, or hedgehog's two signs of it (§2, §9)."""
        scores = (x @ matrix.to(x.dtype)).float()
        if self.config.feature_map == "hedgehog":
            return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1).mul(0.5).clamp_min(PHI_FLOOR)
        return scores.softmax(-1).clamp_min(PHI_FLOOR)

    def _window_branch(self, p: "Projected", padding_mask: Tensor | None, layer: HybridLayerCache | None) -> Tensor:
        if layer is None:
            positions = ordinals(padding_mask, p.hidden.shape[1], p.hidden.device)
            key, value, tape = p.rotated_key, p.value, positions
            sink_key, sink_value, sink_position = take_sinks(key, value, positions, self.config.sinks)
        else:
            if not layer.is_initialized:
                layer.lazy_initialization(p.rotated_key, p.value)
            positions = layer.ordinals(padding_mask, p.rotated_key)
            key, value = layer.update(p.rotated_key, p.value, positions)
            tape = layer.window_positions
            sink_key, sink_value, sink_position = layer.sink_keys, layer.sink_values, layer.sink_positions
        repeated = (self._repeat(x) for x in (key, value, sink_key, sink_value))
        key, value, sink_key, sink_value = repeated
        return window_attention(
            p.rotated_query, key, value, positions, tape, sink_key, sink_value, sink_position, self.window
        )

    def _repeat(self, x_BKTD: Tensor) -> Tensor:
        return x_BKTD.repeat_interleave(self.groups, 1) if self.groups > 1 else x_BKTD


class HeadwiseLinear(nn.Module):
    """One linear unit per head: [B, H, T, width] → [B, H, T, 1], its input times `scale`.

    Queries and keys are large (a head's ‖x‖₁ is in the hundreds): unscaled, one AdamW step at Stage I's learning rate
    moves the gate's pre-activation by several units, and heads shut for good. The functions it can be are the same (our
    choice; the paper says nothing of it).
    """

    def __init__(self, heads: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads))

    def forward(self, x_BHTD: Tensor) -> Tensor:
        return x_BHTD @ (self.scale * self.weight).to(x_BHTD.dtype)[:, :, None] + self.bias[:, None, None]


class Projected:
    """What a layer's attention sees. Shapes: hidden [B, T, hidden]; query [B, H, T, D]; key, value [B, H_kv, T, D]."""

    def __init__(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, rotated_query: Tensor, rotated_key: Tensor
    ) -> None:
        self.hidden, self.query, self.key, self.value = hidden, query, key, value
        self.rotated_query, self.rotated_key = rotated_query, rotated_key

    def detach(self) -> "Projected":
        """The same values outside the graph."""
        fields = (self.hidden, self.query, self.key, self.value, self.rotated_query, self.rotated_key)
        return Projected(*(x.detach() for x in fields))


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of [B, H, T, D] with cos and sin [B or 1, T, D] (halves, as in Llama)."""
    cos, sin = cos[:, None], sin[:, None]
    return tuple((x * cos + _rotate_half(x) * sin).to(x.dtype) for x in (query, key))  # type: ignore[return-value]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def ordinals(padding_mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Ordinal of each position among the real ones, −1 for padding: [B or 1, T]."""
    if padding_mask is None:
        return torch.arange(length, device=device)[None]
    real = padding_mask.to(torch.bool)
    return torch.where(real, real.long().cumsum(1) - 1, -1)


def take_sinks(key: Tensor, value: Tensor, positions: Tensor, sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [B, H, N, D] and ordinals [B or 1, N] of the first N = min(sinks, T) real positions."""
    count = min(sinks, key.shape[2])
    wanted = torch.arange(count, device=key.device)
    here = positions[:, None, :] == wanted[:, None]  # [B or 1, N, T]
    index = here.int().argmax(-1)  # [B or 1, N]
    found = torch.where(here.any(-1), wanted, -1)
    index = index.expand(key.shape[0], -1)[:, None, :, None]
    gather = lambda x: x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))  # noqa: E731
    return gather(key), gather(value), found
