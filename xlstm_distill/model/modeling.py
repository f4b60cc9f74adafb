"""The hybrid xLSTM as a Hugging Face model: the teacher's architecture with every attention module replaced."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .cache import HybridCache
from .configuration import HybridConfig
from .gates import GateRecorder
from .layout import Layout, documents_of, has_holes, make_layout
from .mixer import NEW_PARAMETERS, HybridMixer

Objective = Callable[[Tensor, Tensor], Tensor]
"""(hidden states after the final norm [B, T, hidden], LM head [V, hidden]) → loss."""


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    raise RuntimeError("a teacher's attention module was left in a hybrid xLSTM")


# Registering the name without a mask function of the same name keeps transformers from building [T, T] masks.
AttentionInterface.register("hybrid_xlstm", _no_attention)


class HybridPreTrainedModel(PreTrainedModel):
    """What loading and saving need to know."""

    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # A state cannot be rolled back: on this flag transformers refuses assisted decoding and prompt look-up.
    _is_stateful = True


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """A causal language model whose layers mix with mLSTM, window and sinks."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

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

    def record_gates(self) -> GateRecorder:
        """`with model.record_gates() as gates: model(…)`, then `gates.means()`: mean output gate [layers, heads].

        Raises:
            ValueError: the student has no gate, because one of its branches is off.
        """
        return GateRecorder(self)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def new_cache(self) -> HybridCache:
        """An empty state."""
        return HybridCache([mixer.window for mixer in self.mixers], self.config.sinks)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        objective: Objective | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] for `input_ids` [B, T].

        There are no attention weights: `output_attentions` gives none.

        Args:
            input_ids: tokens.
            attention_mask: [B, past + T], 0 where padding, which stands before or after a row's tokens.
            position_ids: [B or 1, T] for RoPE; default: counted in real tokens, from 0 in each row, or document.
            past_key_values: state of an earlier call, from `new_cache`; it is advanced in place.
            inputs_embeds: [B, T, hidden] instead of `input_ids`.
            labels: [B, T] tokens, −100 to ignore: adds the shifted cross-entropy.
            use_cache: whether to return a state; default: no (`generate` asks for it).
            logits_to_keep: compute only the last so many logits; 0: all.
            objective: computes the loss from hidden states and LM head instead of logits. It runs in here so that the
                hooks of sharding strategies have gathered the (tied) head.
            document_ids: [B or 1, T] numbers that change where a packed row's next document starts; read only with
                `config.reset_at_documents`. Without them, `position_ids` that start again tell the same.
            **kwargs: passed to the decoder (`output_hidden_states`) and to the loss (`num_items_in_batch`).

        Raises:
            ValueError: packed documents and a state; a state or a mask of another kind.
        """
        length = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
        use_cache = bool(use_cache) if objective is None else False
        self._check_state(past_key_values, attention_mask, length)
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        padding_mask = attention_mask if attention_mask is not None and not bool(attention_mask.all()) else None
        documents = self._documents(document_ids, position_ids, padding_mask, past_key_values, length)
        layout = make_layout(padding_mask, documents, length)
        if padding_mask is not None and layout is not None and has_holes(padding_mask, layout):
            raise ValueError(
                "attention_mask: padding between the tokens of a row; pad prompts on the left "
                '(tokenizer.padding_side = "left")'
            )
        if position_ids is None and layout is not None:
            position_ids = self._positions(layout, padding_mask, length)
        outputs = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            layout=layout,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if objective is not None:
            return CausalLMOutputWithPast(loss=objective(hidden, self.lm_head.weight))
        kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        logits = self.lm_head(kept)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _check_state(self, state: object, mask: Tensor | None, length: int) -> None:
        if state is not None and not isinstance(state, HybridCache):
            raise ValueError(
                f"past_key_values={type(state).__name__}: a hybrid xLSTM keeps a HybridCache; leave it out, or start "
                "from model.new_cache()"
            )
        total = length + (state.get_seq_length() if state is not None else 0)
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != total):
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)}: expected [batch, {total}], 0 where padding, over the "
                "positions in past_key_values and the new ones"
            )

    def _documents(
        self,
        given: Tensor | None,
        position_ids: Tensor | None,
        padding_mask: Tensor | None,
        cache: HybridCache | None,
        length: int,
    ) -> Tensor | None:
        """Document numbers where rows are to be split."""
        if not self.config.reset_at_documents or (given is None and position_ids is None):
            return None
        documents = documents_of(position_ids, padding_mask) if given is None else given  # type: ignore[arg-type]
        if documents.shape[1] != length:
            raise ValueError(f"document_ids of shape {tuple(documents.shape)}: expected [batch, {length}]")
        if cache is None:
            return documents
        if bool((documents != documents[:, :1]).any()):
            raise ValueError("packed documents have no common state: pass use_cache=False, or one document per row")
        return None

    @staticmethod
    def _positions(layout: Layout, padding_mask: Tensor | None, length: int) -> Tensor:
        if layout.split or padding_mask is None:
            return layout.ordinal.clamp_min(0)
        return (padding_mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]  # the mask counts the past, too


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
