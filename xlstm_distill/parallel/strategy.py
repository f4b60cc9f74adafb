"""One face for every way to spread a training step: process group, sharding, reduction, clipping.

A strategy never changes what is computed, up to rounding: losses are sums over the *global* batch divided by its count,
and gradients are sums over ranks.
"""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import Strategy as Settings

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class Strategy:
    """One process, one device: also the base of the others."""

    loss_factor = 1.0
    """Losses are multiplied by it before the backward pass, so that gradients come out as sums over ranks."""

    def __init__(self, settings: Settings, world: World) -> None:
        self.settings, self.world = settings, world
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(settings.threads or _threads(world))

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.settings.precision]

    def prepare(self, model: nn.Module, replicated: Iterable[nn.Parameter] = ()) -> None:
        """Move `model` (a causal LM with `model.layers`) to the device; shard it, but for `replicated`."""
        model.to(self.device)

    def autocast(self) -> torch.autocast:
        """Context in which the products are computed in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return value

    def barrier(self) -> None:
        """Wait for every rank."""

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> float:
        """Clip the gradient's global norm (0: only measure it); returns the norm before."""
        norm = nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def full(self, value: Tensor) -> Tensor:
        """The whole of a parameter, on the CPU. Collective."""
        return value.detach().cpu()

    def close(self) -> None:
        """Leave the process group."""


def _threads(world: World) -> int:
    """What the launcher or the user set, else this process's cores divided by the ranks."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, len(os.sched_getaffinity(0)) // world.size)


def make_strategy(settings: Settings, world: World) -> Strategy:
    """The strategy that `settings.name` means for this world.

    Raises:
        Mistake: `single` with more than one rank.
    """
    from xlstm_distill.parallel.fsdp import FullySharded

    if settings.name == "single" and world.size > 1:
        raise Mistake(f"strategy.name=single: {world.size} ranks were started; use strategy.name=fsdp or one GPU")
    if settings.name == "fsdp" or world.size > 1:
        return FullySharded(settings, world)
    return Strategy(settings, world)


def join(world: World) -> None:
    """Join the process group of this job: NCCL where there are GPUs, else gloo. Alone: a group of one, by a file."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
