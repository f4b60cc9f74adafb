"""What a Distil-xLSTM uses of the package `xlstm` (Apache-2.0), imported without its compiler and `mlstm_kernels`.

One of its modules asks torch for CUDA's headers when it is imported, which ends in an OSError on machines with a GPU
and no toolkit, and takes a moment elsewhere. What it would compile is not used here.
"""

import sys
from types import ModuleType
from typing import Any


def _no_compiler(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("xlstm's CUDA kernels are off in this process: import xlstm before a Distil-xLSTM is made")


if "xlstm" not in sys.modules:
    _stub: Any = ModuleType("xlstm.blocks.slstm.src.cuda_init")
    _stub.load = _no_compiler
    sys.modules[_stub.__name__] = _stub

try:  # transformers imports what it finds outside of such a block by itself, before the code that is here
    from xlstm.blocks.mlstm.backends import chunkwise_simple, parallel_stabilized_simple
    from xlstm.blocks.mlstm.cell import mLSTMCell
    from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig
    from xlstm.blocks.slstm.cell import sLSTMCell_vanilla
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig
    from xlstm.blocks.xlstm_block import xLSTMBlock, xLSTMBlockConfig
    from xlstm.components.feedforward import FeedForwardConfig
    from xlstm.components.ln import LayerNorm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("a Distil-xLSTM needs the package xlstm: pip install --no-deps xlstm") from error

__all__ = [
    "FeedForwardConfig",
    "LayerNorm",
    "chunkwise_simple",
    "mLSTMCell",
    "mLSTMLayer",
    "mLSTMLayerConfig",
    "parallel_stabilized_simple",
    "sLSTMCell_vanilla",
    "sLSTMLayer",
    "sLSTMLayerConfig",
    "xLSTMBlock",
    "xLSTMBlockConfig",
]
