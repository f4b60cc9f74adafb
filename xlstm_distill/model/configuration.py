"""Configuration of a hybrid xLSTM."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .families import check_family


class HybridConfig(PreTrainedConfig):
    """The teacher's own configuration and the choices of the mixer (paper.md §9 in words).

    Args:
        base_config: the teacher's configuration (an object or its dictionary).
        window: W, positions of the sliding window, the current one included.
        sinks: first positions of the sequence that every query sees, on top of the window.
        feature_map: `softmax` or `hedgehog`.
        input_gate_soft_cap: c of c·tanh(x/c) on the input gate's pre-activation.
        output_gate_bias: initial bias of the output gate.
        chunk: length of a chunk of the chunkwise-parallel mLSTM; speed only.
        use_mlstm: False leaves the window (o = 0).
        use_window: False leaves the mLSTM (o = 1).
    """

    model_type = "hybrid_xlstm"
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        window: int = 512,
        sinks: int = 4,
        feature_map: str = "softmax",
        input_gate_soft_cap: float = 15.0,
        output_gate_bias: float = -4.0,
        chunk: int = 64,
        use_mlstm: bool = True,
        use_window: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(base_config, dict):
            base_config = AutoConfig.for_model(**base_config)
        elif base_config is None:
            base_config = AutoConfig.for_model("llama")
        check_family(base_config.model_type)
        if not (use_mlstm or use_window):
            raise ValueError("use_mlstm and use_window are both False: nothing would be mixed")
        self.base_config = base_config
        self.window, self.sinks, self.feature_map = window, sinks, feature_map
        self.input_gate_soft_cap, self.output_gate_bias, self.chunk = input_gate_soft_cap, output_gate_bias, chunk
        self.use_mlstm, self.use_window = use_mlstm, use_window
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype"):
            kwargs.setdefault(name, getattr(base_config, name, None))
        super().__init__(**kwargs)

    @property
    def base(self) -> PreTrainedConfig:
        """The teacher's configuration."""
        return self.base_config

    def native_window(self, layer: int) -> int | None:
        """The window that the teacher's own attention has on this layer; None where it is full."""
        kinds = getattr(self.base, "layer_types", None)
        return self.base.sliding_window if kinds and kinds[layer] == "sliding_attention" else None

    # What libraries read off a decoder's configuration.
    hidden_size = property(lambda self: self.base.hidden_size)
    num_hidden_layers = property(lambda self: self.base.num_hidden_layers)
    num_attention_heads = property(lambda self: self.base.num_attention_heads)
    num_key_value_heads = property(lambda self: self.base.num_key_value_heads)
    vocab_size = property(lambda self: self.base.vocab_size)
    max_position_embeddings = property(lambda self: self.base.max_position_embeddings)
