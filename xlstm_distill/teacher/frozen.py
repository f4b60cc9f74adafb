"""The frozen teacher: spread like a student that trains, run on token ids, read out inside its head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from xlstm_distill.model.layout import make_layout
from xlstm_distill.parallel.load import empty_model
from xlstm_distill.parallel.strategy import Strategy

Found = TypeVar("Found")


class FrozenTeacher:
    """A causal LM of transformers that never trains.

    Args:
        folder: Hugging Face folder.
        strategy: how it is spread; every call is collective.
        split: it sees the documents of a sample apart.
        dtype: of the parameters between forwards.
        layers_mean: add up what the decoder layers give.
    """

    def __init__(
        self,
        folder: Path,
        strategy: Strategy,
        split: bool = False,
        dtype: torch.dtype = torch.float32,
        layers_mean: bool = False,
    ) -> None:
        self.strategy, self.split = strategy, split
        self.model = empty_teacher(folder, dtype)
        strategy.prepare(self.model, folder)
        self.soft_cap: float | None = getattr(self.model.config, "final_logit_softcapping", None)
        self.vocabulary = int(self.model.config.vocab_size)
        self.layers_mean: Tensor | None = None
        """Of the last forward, [B, T, H] in float32: it is there when the head is."""
        if layers_mean:
            for layer in self.model.model.layers:
                layer.register_forward_hook(self._add_layer)

    def _add_layer(self, layer: Any, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        share = hidden.float() / len(self.model.model.layers)
        self.layers_mean = share if self.layers_mean is None else self.layers_mean.add_(share)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, document: Tensor, take: Callable[[Tensor, Tensor], Found]) -> Found:
        """What `take` makes of the last hidden states after the final norm, [B·T, H], and the head's weight [V, H].

        Args:
            tokens: [B, T].
            document: [B, T], numbers that change where the next document starts.
            take: called inside the head's forward, because only there a sharded head is whole.
        """
        found: list[Found] = []
        self.layers_mean = None

        def read(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            found.append(take(inputs[0].flatten(0, 1), module.weight))
            return (inputs[0][:, -1:],)  # all that the head computes itself

        handle = self.model.lm_head.register_forward_pre_hook(read)
        try:
            with self.strategy.autocast():
                tokens, document = (x.to(self.strategy.device) for x in (tokens, document))
                self.model(input_ids=tokens, position_ids=document_positions(document, self.split), use_cache=False)
        finally:
            handle.remove()
        return found[0]


def document_positions(document: Tensor, split: bool) -> Tensor | None:
    """Positions [B, T] that start again with each document: from these a transformer knows not to look across.

    Args:
        document: [B, T], numbers that change where the next document starts.
        split: False: one row is one sequence, whatever it holds; then None.
    """
    if not split:
        return None
    layout = make_layout(None, document, document.shape[1])
    assert layout is not None
    return layout.ordinal


def empty_teacher(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The teacher in `folder`, its weights still to be read (`Strategy.prepare`)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = empty_model(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    for parameter in model.parameters():  # buffers stay as they are: RoPE's frequencies need float32
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)
