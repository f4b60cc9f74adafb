"""Configuration of a hybrid xLSTM."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from .families import check_family

CHOICES = {
    "feature_map": ("softmax", "hedgehog"),
    "feature_rope": ("before", "after", "none"),
    "gate_input": ("qkv", "qkv_rotated", "hidden"),
    "kernel": ("auto", "torch", "triton"),
}
LARGEST_CAP = 40.0
"""Of the input gate: with e^±60 sums over many positions, or gradients, leave float32."""


def _of_base(name: str) -> Any:
    """A property that is the teacher's."""
    return property(
        lambda self: getattr(self.base_config, name), lambda self, value: setattr(self.base_config, name, value)
    )


class StudentConfig(PreTrainedConfig):
    """The teacher's own configuration beside the student's choices: what every student has.

    Raises:
        ValueError: the teacher's family is not known.
    """

    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012

    def __init__(self, base_config: PreTrainedConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.base_config = _own(base_config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype"):
            kwargs.setdefault(name, getattr(self.base_config, name, None))
        super().__init__(**kwargs)

    @property
    def base(self) -> PreTrainedConfig:
        """The teacher's configuration."""
        return self.base_config

    @property
    def head_dim(self) -> int:
        """D, width of a head of the teacher's."""
        return getattr(self.base, "head_dim", None) or self.base.hidden_size // self.base.num_attention_heads

    # What libraries read off a decoder's configuration; resizing the embeddings sets the vocabulary.
    hidden_size = _of_base("hidden_size")
    vocab_size = _of_base("vocab_size")
    max_position_embeddings = _of_base("max_position_embeddings")
    initializer_range = _of_base("initializer_range")


def _own(base_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """A configuration that nobody else has: the model sets its attention implementation and its vocabulary."""
    if isinstance(base_config, dict):
        base_config = AutoConfig.for_model(**base_config)
    elif base_config is None:
        base_config = AutoConfig.for_model("llama")
    else:
        base_config = deepcopy(base_config)
    check_family(base_config.model_type)
    return base_config


class HybridConfig(StudentConfig):
    """The teacher's own configuration and the choices of the mixer, those that the paper leaves open included.

    Args:
        base_config: the teacher's configuration (an object or its dictionary).
        window: W, positions of the sliding window, the current one included.
        layer_windows: W of each layer, where they differ.
        sinks: first positions of the sequence that every query sees, on top of the window.
        feature_map: φ, `softmax` of x W over the features, or `hedgehog`: of x W and −x W.
        feature_rope: RoPE `before` φ, `after` it (in the numerator only: RoFormer, Su et al. 2021, Eq. 19), or `none`
            in the mLSTM branch.
        gate_input: what the output gate sees: `qkv` of its head before RoPE, `qkv_rotated`, or `hidden`, the layer's
            input.
        input_gate_soft_cap: c of c·tanh(x/c) on the input gate's pre-activation.
        output_gate_bias: initial bias of the output gate.
        forget_gate_bias: initial biases of the forget gate, evenly from the first head to the last: at 3 a head halves
            its state in 14 tokens, at 6 in 280.
        reset_at_documents: in a packed row, window, sinks, state and positions start anew with each document. Forward
            calls then tell the documents: `document_ids`, or `position_ids` that start again.
        use_mlstm: False leaves the window (o = 0).
        use_window: False leaves the mLSTM (o = 1).
        use_gates: False leaves linear attention: i = f = 1.
        chunk: length of a chunk of the chunkwise-parallel mLSTM; speed only.
        kernel: what computes the mLSTM: `auto`, `torch` or `triton`; speed only. With `feature_rope`
            `after` it is always torch.

    Raises:
        ValueError: the teacher's family is not known, or a choice is not one.
    """

    model_type = "hybrid_xlstm"
    kind = "hybrid"
    """As `student.kind` names it."""

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        window: int = 512,
        sinks: int = 4,
        feature_map: str = "softmax",
        feature_rope: str = "before",
        gate_input: str = "qkv",
        input_gate_soft_cap: float = 15.0,
        output_gate_bias: float = -4.0,
        forget_gate_bias: Sequence[float] = (3.0, 6.0),
        reset_at_documents: bool = False,
        use_mlstm: bool = True,
        use_window: bool = True,
        use_gates: bool = True,
        chunk: int = 64,
        kernel: str = "auto",
        layer_windows: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        base_config = _own(base_config)
        if not (use_mlstm or use_window):
            raise ValueError("use_mlstm and use_window are both False: nothing would be mixed")
        if window < 1 or sinks < 0 or chunk < 1 or not 0 < input_gate_soft_cap <= LARGEST_CAP:
            raise ValueError(
                f"expected window ≥ 1, sinks ≥ 0, chunk ≥ 1 and {LARGEST_CAP} ≥ input_gate_soft_cap > 0, not {window}, "
                f"{sinks}, {chunk} and {input_gate_soft_cap}"
            )
        self.window, self.sinks = window, sinks
        self.layer_windows = list(layer_windows) if layer_windows else None
        layers = base_config.num_hidden_layers
        if self.layer_windows and (len(self.layer_windows) != layers or min(self.layer_windows) < 1):
            raise ValueError(f"layer_windows={self.layer_windows}: expected {layers} windows of at least 1")
        self.feature_map, self.feature_rope, self.gate_input = feature_map, feature_rope, gate_input
        self.kernel = kernel
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        self.input_gate_soft_cap, self.output_gate_bias = input_gate_soft_cap, output_gate_bias
        if len(forget_gate_bias) != 2:
            raise ValueError(f"forget_gate_bias={list(forget_gate_bias)}: expected the first head's and the last one's")
        self.forget_gate_bias = list(forget_gate_bias)
        self.reset_at_documents = reset_at_documents
        self.use_mlstm, self.use_window, self.use_gates = use_mlstm, use_window, use_gates
        self.chunk = chunk
        super().__init__(base_config, **kwargs)

    def native_window(self, layer: int) -> int | None:
        """The window that the teacher's own attention has on this layer; None where it is full."""
        kinds = getattr(self.base, "layer_types", None)
        return self.base.sliding_window if kinds and kinds[layer] == "sliding_attention" else None

    def windows(self, layers: int) -> list[int]:
        """W of each of the first so many layers."""
        return (self.layer_windows or [self.window] * layers)[:layers]

    def layer_window(self, layer: int) -> int:
        """The student's window on this layer: W, or the teacher's own where that is smaller."""
        window = self.layer_windows[layer] if self.layer_windows else self.window
        return min(window, self.native_window(layer) or window)

    def state_bytes(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state (`HybridCache`) of `batch` sequences of any length; `dtype`: of keys and values.

        With b bytes per key or value, per row and layer:

            4·H·D_φ·(D + 1)                       (S, z) of the mLSTM in float32; D_φ = D, for hedgehog 2·D
            (2·b·H_kv·D + 8)·(sinks + W) + 8      keys, values and positions of the window and the sinks; tokens read
        """
        base = self.base
        heads, dim = base.num_attention_heads, self.head_dim
        features = dim * (2 if self.feature_map == "hedgehog" else 1)
        matrix = 4 * heads * features * (dim + 1) if self.use_mlstm else 0
        slot = 2 * dtype.itemsize * base.num_key_value_heads * dim + 8
        slots = [self.sinks + self.layer_window(n) for n in range(base.num_hidden_layers)]
        windows = sum(slot * count + 8 for count in slots) if self.use_window else 0
        return batch * (matrix * base.num_hidden_layers + windows)

    num_hidden_layers = _of_base("num_hidden_layers")
    num_attention_heads = _of_base("num_attention_heads")
    num_key_value_heads = _of_base("num_key_value_heads")
    intermediate_size = _of_base("intermediate_size")
