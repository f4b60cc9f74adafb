"""What the model card says of a student because of its kind."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xlstm_distill.model.configuration import StudentConfig

HYBRID = "[Effective Distillation to Hybrid xLSTM Architectures](https://arxiv.org/abs/2603.15590)"
DISTIL = "[Distil-xLSTM](https://arxiv.org/abs/2503.18565)"


@dataclass(frozen=True)
class Kind:
    """Sentences, and parts of sentences."""

    name: str
    made: str
    """What stands where in it, and after whom."""
    needs: str
    """To be loaded."""
    columns: str
    """What the columns `within` and `beyond` of the held-out table are; empty: it has none."""
    reach: str
    """What is reached only through the state."""
    tags: tuple[str, ...]


def kind_of(config: "StudentConfig") -> Kind:
    """The kind of the student with this configuration."""
    if config.model_type == "distil_xlstm":
        blocks = config.num_hidden_layers
        return Kind(
            name="a Distil-xLSTM",
            made=f"{blocks} xLSTM blocks, sLSTM and mLSTM by turns, stand in the place of its "
            f"{config.base.num_hidden_layers} layers, between its own embedding and head, after {DISTIL} (Thiombiano "
            "et al.)",
            needs="It needs torch, transformers 5 and the package `xlstm` (`pip install --no-deps xlstm`: "
            "`mlstm_kernels`, which has a licence of its own, is not used); the modelling code lies in this folder.",
            columns="",
            reach="A token that was read is reached only through the recurrent state:",
            tags=("xlstm", "mlstm", "slstm", "linear-attention", "distillation", "custom_code"),
        )
    windows = config.layer_windows or []
    own = ", ".join(f"{window} in layer {layer}" for layer, window in enumerate(windows) if window != config.window)
    tokens = f"{config.window} tokens" + (f" ({own})" if own else "")
    return Kind(
        name="a hybrid xLSTM",
        made=f"in every layer an mLSTM beside a sliding window of {tokens} and {config.sinks} attention "
        f"sinks stands in the place of attention, after {HYBRID} (Hauzenberger et al.)",
        needs="It needs torch and transformers 5; the modelling code lies in this folder. On GPUs with Triton its "
        "kernel computes the mLSTM, else torch does (`kernel` in config.json).",
        columns=f"; within, beyond: at positions whose whole context the window of {config.window} reaches, and at "
        "the others",
        reach=f"Beyond the last {max([config.window, *windows])} tokens and the first {config.sinks}, a token is "
        "reached only through the recurrent state:",
        tags=("xlstm", "mlstm", "hybrid", "linear-attention", "distillation", "custom_code"),
    )
