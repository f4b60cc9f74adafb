"""AdamW with decay on matrices only, and the learning-rate schedule."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from xlstm_distill.contract.schema import AdamW, Training


def make_optimizer(groups: Mapping[float, Mapping[str, nn.Parameter]], settings: AdamW) -> torch.optim.AdamW:
    """AdamW over `{peak learning rate: {name: parameter}}`; weight decay on parameters of two or more dimensions."""
    split = []
    for lr, parameters in groups.items():
        for decays in (True, False):
            chosen = [p for p in parameters.values() if _is_matrix(p) == decays]
            if chosen:
                decay = settings.weight_decay if decays else 0.0
                split.append({"params": chosen, "lr": lr, "peak": lr, "weight_decay": decay})
    return torch.optim.AdamW(split, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True)


def _is_matrix(parameter: nn.Parameter) -> bool:
    """A parameter that DeepSpeed has partitioned has its shape in `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2


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
