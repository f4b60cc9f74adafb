"""The student. Importing this registers it with transformers' Auto classes.

The package imports only itself, torch and transformers, so that an export can copy the folder.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import HybridCache
from .configuration import HybridConfig
from .convert import convert
from .modeling import HybridForCausalLM

AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)

__all__ = ["HybridCache", "HybridConfig", "HybridForCausalLM", "convert"]
