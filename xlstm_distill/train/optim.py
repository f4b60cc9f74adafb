"""AdamW with decay on matrices only, the learning-rate schedule, and the optimiser's state by parameter name."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xlstm_distill.contract.schema import Training


def make_optimizer(groups: Mapping[float, Mapping[str, nn.Parameter]], settings: Training) -> torch.optim.AdamW:
    """AdamW over `{peak learning rate: {name: parameter}}`; weight decay on parameters of two or more dimensions."""
    split = []
    for lr, parameters in groups.items():
        for decays in (True, False):
            chosen = [p for p in parameters.values() if (p.ndim >= 2) == decays]
            if chosen:
                decay = settings.weight_decay if decays else 0.0
                split.append({"params": chosen, "lr": lr, "peak": lr, "weight_decay": decay})
    return torch.optim.AdamW(split, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, steps: int, peak: float, settings: Training) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up to `peak`, then constant or cosine to `min_lr`."""
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    floor = min(settings.min_lr, peak)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, settings: Training) -> float:
    """Give every group its learning rate of this step; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, group["peak"], settings)
    return float(optimizer.param_groups[0]["lr"])


def training_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and AdamW's moments under flat names, as the tensors themselves: loading writes into them.

    Moments that do not exist yet (before the first step) are created as zeros.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        own = optimizer.state[parameter]
        if not own:
            own["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state[f"parameter.{name}"] = parameter.detach()
        state[f"exp_avg.{name}"], state[f"exp_avg_sq.{name}"] = own["exp_avg"], own["exp_avg_sq"]
    return state


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell AdamW how many steps it has made (its bias correction)."""
    for own in optimizer.state.values():
        own["step"].fill_(float(step))
