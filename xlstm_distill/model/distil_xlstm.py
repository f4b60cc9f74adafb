"""Distil-xLSTM (Thiombiano et al. 2025, arXiv 2503.18565): xLSTM blocks between the teacher's embedding and head.

Half as many blocks as the teacher has layers, sLSTM and mLSTM by turns. Embedding and LM head are the teacher's and
never train; the blocks and the norm behind them start at random.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache import StateCache
from .configuration import StudentConfig
from .layout import Layout
from .student import StudentForCausalLM


class DistilXLSTMConfig(StudentConfig):
    """The teacher's own configuration and the shape of the blocks: but for their number the `xlstm` package's.

    Args:
        base_config: the teacher's configuration (an object or its dictionary).
        num_blocks: blocks; 0: half the teacher's layers, rounded down, at least one.
        heads: of both cells.
        conv_kernel: positions of the causal convolutions.
        qkv_block: features among which the mLSTM's projections of q, k and v mix.
        mlstm_factor: inner width of the mLSTM over the model's.
        ffn_factor: inner width of the sLSTM's MLP over the model's.

    Raises:
        ValueError: the teacher's family is not known, or the heads do not divide its width.
    """

    model_type = "distil_xlstm"
    kind = "distil_xlstm"
    """As `student.kind` names it."""
    reset_at_documents = False

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        num_blocks: int = 0,
        heads: int = 4,
        conv_kernel: int = 4,
        qkv_block: int = 4,
        mlstm_factor: float = 2.0,
        ffn_factor: float = 1.3,
        **kwargs: Any,
    ) -> None:
        self.heads, self.conv_kernel, self.qkv_block = heads, conv_kernel, qkv_block
        self.mlstm_factor, self.ffn_factor = mlstm_factor, ffn_factor
        super().__init__(base_config, **kwargs)
        self.num_blocks = num_blocks or max(1, self.base.num_hidden_layers // 2)
        if self.hidden_size % heads or self.hidden_size == heads:
            raise ValueError(f"heads={heads}: expected a proper divisor of the teacher's width {self.hidden_size}")

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return self.num_blocks

    @property
    def inner_size(self) -> int:
        """Width inside the mLSTM, a multiple of 64."""
        return 64 * -(-int(self.mlstm_factor * self.hidden_size) // 64)

    def state_bytes(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state (`DistilCache`) of `batch` sequences; `dtype`: of the stream.

        With width H, inner width I, N heads and b bytes per number of the stream, per row:

            4·4·H + b·(K − 1)·H                     sLSTM: y, c, n, m in float32; what the convolution over K reads
            4·N·((I/N)² + I/N + 1) + b·(K − 1)·I    mLSTM: memory, norm and scale in float32; the same
        """
        before, size = (self.conv_kernel - 1) * dtype.itemsize, self.inner_size // self.heads
        slstm = (16 + before) * self.hidden_size
        mlstm = 4 * self.heads * (size**2 + size + 1) + before * self.inner_size
        return batch * (-(-self.num_blocks // 2) * slstm + self.num_blocks // 2 * mlstm)


class DistilCache(StateCache):
    """`past_key_values` of a Distil-xLSTM of so many blocks."""

    def __init__(self, blocks: int) -> None:
        from .distil_blocks import BlockState

        super().__init__(layers=[BlockState() for _ in range(blocks)])


class DistilDecoder(nn.Module):
    """Embedding, blocks, norm."""

    def __init__(self, config: DistilXLSTMConfig) -> None:
        from .distil_blocks import make_blocks  # they need the package xlstm: only this student does
        from .xlstm_package import LayerNorm

        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        names = ("heads", "conv_kernel", "qkv_block", "mlstm_factor", "ffn_factor")
        shape = {name: getattr(config, name) for name in names}
        self.layers = nn.ModuleList(make_blocks(config.hidden_size, config.num_blocks, **shape))
        self.norm = LayerNorm(config.hidden_size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: DistilCache | None = None,
        layout: Layout | None = None,
        output_hidden_states: bool = False,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the norm [B, T, H] for `input_ids` [B, T] or `inputs_embeds` [B, T, H].

        Args:
            input_ids: tokens.
            inputs_embeds: instead of tokens.
            past_key_values: state, advanced in place.
            layout: where padding stands; None: nowhere.
            output_hidden_states: whether to return what enters each block, and the last.
            **unused: positions, of which there is no need.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        seen = []
        for number, layer in enumerate(self.layers):
            seen.append(x)
            state = None if past_key_values is None else past_key_values.layers[number]
            x = layer(x, layout=layout, past_key_values=state)
        x = self.norm(x)
        states = (*seen, x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values, hidden_states=states)


class DistilXLSTMForCausalLM(StudentForCausalLM):
    """A causal language model of xLSTM blocks."""

    config_class = DistilXLSTMConfig
    cache_class = DistilCache
    kind = "a Distil-xLSTM"

    def __init__(self, config: DistilXLSTMConfig) -> None:
        super().__init__(config)
        self.model = DistilDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Transformers' start for embedding and head alone: blocks and norm have their own."""
        if module in (self.model.embed_tokens, self.lm_head):
            super()._init_weights(module)

    def mixer_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the teacher does not have, by name: blocks and norm."""
        return {n: p for n, p in self.named_parameters() if n.startswith(("model.layers.", "model.norm."))}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Those that distillation trains, by name: all but embedding and head."""
        return self.mixer_parameters()

    def new_cache(self) -> DistilCache:
        """An empty state."""
        return DistilCache(self.config.num_blocks)


def new_blocks(config: DistilXLSTMConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Blocks and norm at their start, by name; the same for the same seed."""
    with torch.device("meta"):
        model = DistilXLSTMForCausalLM(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in (*model.model.layers, model.model.norm):
            module.to_empty(device="cpu")
            module.reset_parameters()
    return {name: parameter.detach().to(dtype) for name, parameter in model.mixer_parameters().items()}
