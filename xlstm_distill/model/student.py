"""What every student is to transformers and to the training stages: one forward around its own decoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .layout import Layout, documents_of, has_holes, make_layout

Objective = Callable[[Tensor, Tensor], Tensor]
"""(hidden states after the final norm [B, T, hidden], LM head [V, hidden]) → loss."""


class StudentForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with a recurrent state, around the decoder `model` and `lm_head`.

    A subclass makes both, and names its cache. The decoder takes `layout` (padding and documents) besides what
    transformers' decoders take.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # A state cannot be rolled back: on this flag transformers refuses assisted decoding and prompt look-up.
    _is_stateful = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    cache_class: type[Cache]
    kind: str
    """In messages."""

    def mixer_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the teacher does not have, by name."""
        raise NotImplementedError

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Those that Stage II trains, by name."""
        raise NotImplementedError

    @property
    def soft_cap(self) -> float | None:
        """c of c·tanh(z/c) on the logits, where the teacher has one (`final_logit_softcapping`)."""
        return getattr(self.config.base, "final_logit_softcapping", None)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def new_cache(self) -> Cache:
        """An empty state."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
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
        if self.soft_cap:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _check_state(self, state: object, mask: Tensor | None, length: int) -> None:
        if state is not None and not isinstance(state, self.cache_class):
            raise ValueError(
                f"past_key_values={type(state).__name__}: {self.kind} keeps a {self.cache_class.__name__}; leave it "
                "out, or start from model.new_cache()"
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
        cache: Cache | None,
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
