"""The training state of every strategy: parameters and AdamW's moments, float32, under flat names.

    parameter.NAME   exp_avg.NAME   exp_avg_sq.NAME

Each is a plain tensor (one rank, or replicated) or a DTensor sharded by rows, as `torch.distributed.checkpoint` saves
and reshards it. AdamW's step is one number for all and stands in the checkpoint's `state.json`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def training_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors themselves: loading writes into them. Moments that do not exist yet (before the first step) are
    created as zeros."""
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        own = optimizer.state[parameter]
        if not own:
            own["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state[f"parameter.{name}"] = parameter.detach()
        state[f"exp_avg.{name}"], state[f"exp_avg_sq.{name}"] = own["exp_avg"], own["exp_avg_sq"]
    return state


def set_optimizer_step(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Tell AdamW how many updates it has made (its bias correction)."""
    for own in optimizer.state.values():
        own["step"].fill_(float(updates))
