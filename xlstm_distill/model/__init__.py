"""The students. Importing this registers them with transformers' Auto classes.

The package imports only itself, torch and transformers, so that an export can copy the folder; `distil_blocks`, which
only a Distil-xLSTM imports when it is made, needs the package xlstm besides.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import HybridCache
from .configuration import HybridConfig
from .convert import convert, convert_distil
from .distil_xlstm import DistilXLSTMConfig, DistilXLSTMForCausalLM
from .modeling import HybridForCausalLM
from .student import StudentForCausalLM

for _config, _model in ((HybridConfig, HybridForCausalLM), (DistilXLSTMConfig, DistilXLSTMForCausalLM)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)

__all__ = [
    "DistilXLSTMConfig",
    "DistilXLSTMForCausalLM",
    "HybridCache",
    "HybridConfig",
    "HybridForCausalLM",
    "StudentForCausalLM",
    "convert",
    "convert_distil",
]
