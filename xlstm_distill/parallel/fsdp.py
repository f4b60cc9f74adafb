"""FSDP2: parameters, gradients and optimiser state sharded over ranks, layer by layer."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import Strategy as Settings
from xlstm_distill.parallel.strategy import Strategy, join


class FullySharded(Strategy):
    """`fully_shard` on each decoder layer, then on the root, which keeps embedding, final norm and (tied) head."""

    def __init__(self, settings: Settings, world: World) -> None:
        super().__init__(settings, world)
        join(world)
        self.mesh = init_device_mesh(self.device.type, (world.size,))
        self.loss_factor = float(world.size)  # the reduce-scatter takes the mean

    def prepare(self, model: nn.Module, replicated: Iterable[nn.Parameter] = ()) -> None:
        """Order: activation checkpointing was applied by the caller, then layers are sharded, then the root."""
        ignored = set(replicated)
        for parameter in ignored:
            parameter.data = parameter.data.to(self.device)
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=self.mesh, mp_policy=policy, ignored_params=ignored)
        fully_shard(model, mesh=self.mesh, mp_policy=policy, ignored_params=ignored)

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

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()
