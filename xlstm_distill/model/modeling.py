"""The hybrid xLSTM as a Hugging Face model: the teacher's architecture with every attention module replaced."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel

from .cache import HybridCache
from .configuration import HybridConfig
from .gates import GateRecorder
from .mixer import NEW_PARAMETERS, HybridMixer
from .student import StudentForCausalLM


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    raise RuntimeError("a teacher's attention module was left in a hybrid xLSTM")


# Registering the name without a mask function of the same name keeps transformers from building [T, T] masks.
AttentionInterface.register("hybrid_xlstm", _no_attention)


class HybridForCausalLM(StudentForCausalLM):
    """A causal language model whose layers mix with mLSTM, window and sinks."""

    config_class = HybridConfig
    cache_class = HybridCache
    kind = "a hybrid xLSTM"
    _supports_attention_backend = True

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        base = config.base
        base._attn_implementation_internal = "hybrid_xlstm"
        self.model = AutoModel.from_config(base, attn_implementation="hybrid_xlstm")
        for layer in self.model.layers:
            layer.self_attn = HybridMixer(config, layer.self_attn)
        self.lm_head = nn.Linear(base.hidden_size, base.vocab_size, bias=False)
        self.post_init()

    def initialize_weights(self) -> None:
        """Give a start to what no checkpoint gave.

        transformers leaves the decoder to the teacher's class, which would draw gates at random and knows no feature
        maps: the mixers go first.
        """
        for mixer in self.mixers:
            if not mixer.query_map.is_meta:
                mixer.reset_parameters()
            for module in (mixer, mixer.input_gate, mixer.forget_gate, mixer.output_gate):
                module._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()

    @property
    def mixers(self) -> list[HybridMixer]:
        """The mixers in order of the layers."""
        return [layer.self_attn for layer in self.model.layers]

    def mixer_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the teacher does not have, by name; those of a branch that is off as well."""
        return {n: p for n, p in self.named_parameters() if any(f".self_attn.{new}" in n for new in NEW_PARAMETERS)}

    def idle_parameters(self) -> dict[str, nn.Parameter]:
        """Those of `mixer_parameters` that compute nothing, because a branch or the gates are off: never trained."""
        config = self.config
        used = {
            "query_map": config.use_mlstm,
            "key_map": config.use_mlstm,
            "input_gate": config.use_mlstm and config.use_gates,
            "forget_gate": config.use_mlstm and config.use_gates,
            "output_gate": config.use_mlstm and config.use_window,
        }
        idle = [f".self_attn.{name}" for name, is_used in used.items() if not is_used]
        return {n: p for n, p in self.mixer_parameters().items() if any(name in n for name in idle)}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Those that Stage II trains, by name: all but the idle ones."""
        idle = self.idle_parameters()
        return {name: p for name, p in self.named_parameters() if name not in idle}

    def record_gates(self) -> GateRecorder:
        """`with model.record_gates() as gates: model(…)`, then `gates.means()`: mean output gate [layers, heads].

        Raises:
            ValueError: the student has no gate, because one of its branches is off.
        """
        return GateRecorder(self)

    def new_cache(self) -> HybridCache:
        """An empty state."""
        return HybridCache([mixer.window for mixer in self.mixers], self.config.sinks)


def new_parameter_state(config: HybridConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The mixers' own parameters at the start of Stage I, by their names, without the rest of the model's memory."""
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    for mixer in model.mixers:
        for name in NEW_PARAMETERS:
            new = getattr(mixer, name)
            if isinstance(new, nn.Parameter):
                setattr(mixer, name, nn.Parameter(torch.empty(new.shape)))
            else:
                new.to_empty(device="cpu")
        mixer.reset_parameters()
    return {name: parameter.detach().to(dtype) for name, parameter in model.mixer_parameters().items()}
