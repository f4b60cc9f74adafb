"""Floating point operations of a training step, per token: what the model needs, whatever computes it.

Counted are the products of matrices, two operations per multiplication: projections, MLP, LM head, attention over the
pairs of positions that see each other, the chunkwise mLSTM, feature maps and gates. Not counted are the embedding,
norms, activations, RoPE, softmax and what a kernel or activation checkpointing computes again. docs/training.md writes
the sums out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, Protocol

from xlstm_distill.contract.distil_xlstm import Blocks

BACKWARD = 2
"""A product in the forward pass costs two in the backward pass: the gradient of either factor."""


class Shape(Protocol):
    """Of the teacher: `contract.schema.Teacher`, or a model's configuration."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


class Choices(Protocol):
    """Of the student: `contract.schema.Student`, or a model's configuration."""

    def windows(self, layers: int) -> Sequence[int]: ...
    @property
    def sinks(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def feature_map(self) -> str: ...
    @property
    def feature_rope(self) -> str: ...
    @property
    def gate_input(self) -> str: ...
    @property
    def use_window(self) -> bool: ...
    @property
    def use_gates(self) -> bool: ...


@dataclass(frozen=True)
class StepFlops:
    """Per token of a training step, by the clock's parts."""

    teacher: float
    """The frozen model: the online teacher of Stage II, the stream of Stage I."""
    forward: float
    """Of the student; Stage I: of the mixers."""
    backward: float
    """For what trains."""

    @property
    def total(self) -> float:
        """What the model FLOPs utilisation counts."""
        return self.teacher + self.forward + self.backward


@dataclass(frozen=True)
class Mixer:
    """What one mixer adds to its projections, per token; the mean of the layers."""

    window: float
    """Softmax attention over window and sinks."""
    scores: float
    """mLSTM: φ(q)·φ(k) within chunks, and φ(q) times the state (S, z)."""
    values: float
    """mLSTM: weights times values within chunks, and φ(k) ⊗ v into S."""
    maps: float
    """Feature maps' matrices."""
    gates: float

    @property
    def total(self) -> float:
        return self.window + self.scores + self.values + self.maps + self.gates


def step_flops(
    stage: Literal["align", "distill"], shape: Shape, choices: Choices, sequence: int, *, online: bool = False
) -> StepFlops:
    """FLOPs per token of one training step.

    Args:
        stage: `align` trains the mixers inside the frozen teacher, `distill` everything.
        shape: of the teacher.
        choices: of the student.
        sequence: T, tokens per row, taken for one document.
        online: Stage II with the teacher beside the student.
    """
    layers, dense = shape.num_hidden_layers, dense_flops(shape)
    head = 2.0 * shape.hidden_size * shape.vocab_size
    attention = layers * shape.num_attention_heads * 4.0 * shape.head_dim * causal_pairs(sequence) / sequence
    if getattr(choices, "kind", "hybrid") == "distil_xlstm":  # always online; its head is frozen
        blocks = Blocks(shape.hidden_size, layers).flops(sequence)
        return StepFlops(dense + head + attention, blocks + head, BACKWARD * blocks + head)
    mixer = mixer_flops(shape, choices, sequence)
    if stage == "align":
        # The inputs of a mixer are given: no gradient of what they are multiplied with, none through the window.
        backward = mixer.maps + mixer.gates + BACKWARD * mixer.scores + mixer.values
        return StepFlops(dense + attention, layers * mixer.total, layers * backward)
    forward = dense + head + layers * mixer.total
    return StepFlops(dense + head + attention if online else 0.0, forward, BACKWARD * forward)


def dense_flops(shape: Shape) -> float:
    """Projections and gated MLP of all layers, forward, per token: two per parameter."""
    width = shape.head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)
    return 2.0 * shape.num_hidden_layers * shape.hidden_size * (width + 3 * shape.intermediate_size)


def mixer_flops(shape: Shape, choices: Choices, sequence: int) -> Mixer:
    """One mixer without its projections, the mean of the layers, forward, per token."""
    heads, dim = shape.num_attention_heads, shape.head_dim
    features = dim * (2 if choices.feature_map == "hedgehog" else 1)
    near = chunk_pairs(sequence, choices.chunk) / sequence
    products = 2 if choices.feature_rope == "after" else 1  # numerator and denominator have features of their own
    has_mlstm = getattr(choices, "use_mlstm", True)
    of_output = shape.hidden_size if choices.gate_input == "hidden" else 3 * dim
    gates = (2 * shape.hidden_size if choices.use_gates else 0) + (of_output if choices.use_window else 0)
    layers = shape.num_hidden_layers  # 0: not known before the teacher is there; then nothing is counted
    windows = choices.windows(layers) if layers else [0]
    window = 4.0 * heads * dim * fmean(window_pairs(sequence, w, choices.sinks) for w in windows) / sequence
    return Mixer(
        window=window if choices.use_window else 0.0,
        scores=has_mlstm * 2.0 * heads * features * (products * near + dim + 1),
        values=has_mlstm * 2.0 * heads * dim * (near + features),
        maps=has_mlstm * 4.0 * heads * dim * dim,
        gates=has_mlstm * 2.0 * heads * gates,
    )


def causal_pairs(sequence: int) -> int:
    """Pairs of T positions of which one sees the other: itself and all before."""
    return _ramp(sequence, sequence)


def window_pairs(sequence: int, window: int, sinks: int) -> int:
    """Pairs under a window of W positions, the current one included, and the sinks that have left it."""
    return _ramp(sequence, window) + _ramp(max(0, sequence - window), sinks)


def chunk_pairs(sequence: int, chunk: int) -> int:
    """Pairs within chunks of L positions, the last of which may be shorter."""
    whole, rest = divmod(sequence, chunk)
    return whole * _ramp(chunk, chunk) + _ramp(rest, rest)


def _ramp(count: int, limit: int) -> int:
    """min(1, limit) + min(2, limit) + … + min(count, limit)."""
    rising = min(count, limit)
    return rising * (rising + 1) // 2 + (count - rising) * rising
