"""One face for every way to spread a training step: process group, sharding, reduction, clipping, the optimiser's step.

A strategy never changes what is computed, up to rounding: losses are sums over the *global* batch divided by its count,
and gradients are sums over ranks. Its training state is the same tensors under the same names (`parallel/state.py`), so
a checkpoint of one strategy and world size goes on under any other.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Strategy as Settings
from xlstm_distill.parallel.load import materialise, read_weights
from xlstm_distill.parallel.state import set_optimizer_step, training_state

LONGEST_SECONDS = 1800.0
"""For which a collective may wait where no step is made."""
Read = Callable[[dict[str, Tensor]], None]
"""Fills tensors from a checkpoint, in place."""


class Strategy:
    """One process, one device: also the base of the others.

    In the order of their use: `prepare` each model; `train` the one that has an optimiser; per step `backward` for each
    micro-batch, `norm`, then `step` or `discard`; `close`.
    """

    loss_factor = 1.0
    """Losses are multiplied by it before the backward pass, so that gradients come out as sums over ranks."""

    def __init__(self, settings: Settings, world: World) -> None:
        self.settings, self.world = settings, world
        cuda = torch.cuda.is_available()
        # A site may show each rank its own GPU only.
        self.device = (
            torch.device("cuda", world.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
        )
        if cuda:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(settings.threads or _threads(world))
        self.optimizer: torch.optim.Optimizer

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.settings.precision]

    def prepare(self, model: nn.Module, weights: Path, replicated: Iterable[nn.Parameter] = ()) -> None:
        """Make a causal LM with `model.layers`, built on the meta device, real.

        The order, from inside to outside of a layer: recompute, compile, shard; the weights are read last, each rank
        its own. Activation checkpointing wraps the layers' `forward` (transformers' GradientCheckpointingLayer, when it
        was enabled before), so the compiled graph holds the recomputation, and the hooks that gather a layer's
        parameters stay outside of both: they run once forward and once backward, and break no graph.

        Args:
            model: its parameters are empty; buffers are real.
            weights: Hugging Face folder; every rank reads only what it keeps.
            replicated: parameters that stay whole on every rank.
        """
        if self.settings.compile and not replicated:  # Stage I runs its backward inside the layers
            for layer in model.model.layers:  # type: ignore[union-attr]
                layer.compile()
        self._shard(model, set(replicated))
        self._read(model, weights)

    def _shard(self, model: nn.Module, replicated: set[nn.Parameter]) -> None:
        """Nothing to share with nobody."""

    def _read(self, model: nn.Module, weights: Path) -> None:
        materialise(model, self.device)
        read_weights(model, weights)

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """Take the optimiser of a prepared model; gradients are clipped to the global norm `max_norm` (0: never)."""
        self.optimizer, self.max_norm = optimizer, max_norm
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]

    def autocast(self) -> torch.autocast:
        """Context in which the products are computed in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch's share of the global loss; `last`: of this step. Collective."""
        (loss * self.loss_factor).backward()

    def norm(self) -> float:
        """Global norm of the gradients of this step. Collective."""
        norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def step(self, norm: float) -> None:
        """Clip the gradients, whose norm is `norm`, update the parameters and drop the gradients. Collective."""
        if self.max_norm:
            nn.utils.clip_grads_with_norm_(self._trained, self.max_norm, torch.tensor(norm, device=self.device))
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def training_state(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """What a checkpoint holds of the trained `parameters`: see `parallel/state.py`. Collective."""
        return training_state(parameters, self.optimizer)

    def load_training_state(self, parameters: Mapping[str, nn.Parameter], read: Read, updates: int) -> None:
        """Go on from a checkpoint after so many updates, whatever strategy wrote it. Collective."""
        read(training_state(parameters, self.optimizer))
        set_optimizer_step(self.optimizer, updates)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return value

    def barrier(self) -> None:
        """Wait for every rank."""

    def full(self, value: Tensor) -> Tensor:
        """The whole of a parameter, on the CPU. Collective."""
        return value.detach().cpu()

    def whole(self, model: nn.Module, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The parameters of a prepared model by name, whole, on the CPU, one at a time. Collective."""
        for name, parameter in model.named_parameters():
            if name not in without:
                yield name, self.full(parameter)

    def close(self) -> None:
        """Leave the process group."""


def _threads(world: World) -> int:
    """What the launcher or the user set, else this process's cores divided by the ranks."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, len(os.sched_getaffinity(0)) // world.size)


def make_strategy(settings: Settings, world: World, folder: JobFolder | None = None) -> Strategy:
    """The strategy that `settings.name` means for this world.

    Args:
        settings: name, precision, sharding.
        world: this process among its ranks.
        folder: of the job, if there is one: gets what libraries were told (`deepspeed.json`), and its
            `guard.stuck_seconds` says how long a collective may take.

    Raises:
        Mistake: `single` with more than one rank; DeepSpeed is not installed.
    """
    from xlstm_distill.parallel.fsdp import FullySharded

    # More than the watchdog waits: it speaks first, and names the rank. And others wait while rank 0 converts a teacher
    # or writes a student, where no step is made.
    stuck = folder.config.guard.stuck_seconds if folder else 0.0
    timeout = max(stuck + 60, LONGEST_SECONDS) if stuck else 0.0
    if settings.name == "single" and world.size > 1:
        raise Mistake(f"strategy.name=single: {world.size} ranks were started; use strategy.name=fsdp or one GPU")
    if settings.name == "zero3":
        from xlstm_distill.parallel.zero3 import ZeRO3

        return ZeRO3(settings, world, timeout, folder)
    if settings.name == "fsdp" or world.size > 1:
        return FullySharded(settings, world, timeout)
    return Strategy(settings, world)
