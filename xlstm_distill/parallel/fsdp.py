"""FSDP2: parameters, gradients and optimiser state sharded over ranks, layer by layer."""

from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import Strategy as Settings
from xlstm_distill.parallel.group import join, make_mesh
from xlstm_distill.parallel.strategy import Strategy


class FullySharded(Strategy):
    """`fully_shard` on each decoder layer, then on the root, which keeps embedding, final norm and (tied) head.

    Every micro-batch's gradients are reduced and sharded at once. To wait for the last one would save communication,
    but keep whole gradients in float32 on every rank, 4 bytes a parameter: what sharding is there to avoid.
    """

    def __init__(self, settings: Settings, world: World, timeout: float = 0.0) -> None:
        super().__init__(settings, world)
        join(world, timeout)
        self.mesh = make_mesh(self.device, world, settings.shard)
        self.loss_factor = float(world.size)  # the reduction of gradients takes the mean

    def _shard(self, model: nn.Module, replicated: set[nn.Parameter]) -> None:
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=self.mesh, mp_policy=policy, ignored_params=replicated)
        fully_shard(model, mesh=self.mesh, mp_policy=policy, ignored_params=replicated)

    def autocast(self) -> torch.autocast:
        """The mixed-precision policy casts already."""
        return torch.autocast(self.device.type, enabled=False)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def full(self, value: Tensor) -> Tensor:
        """The whole of a parameter, on the CPU. Collective."""
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()

    def whole(self, model: nn.Module, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """After a forward without a backward the root still holds its parameters gathered, rounded to the dtype of the
        products: they are given back first."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().whole(model, without)

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()
