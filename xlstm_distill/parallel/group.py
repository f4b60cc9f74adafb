"""The process group of a job, and its grid of nodes × ranks within a node."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import World


def join(world: World, timeout: float) -> None:
    """Join the process group of this job: NCCL where there are GPUs, else gloo. Alone: a group of one, by a store in
    memory. A collective that does not come back within `timeout` seconds (0: torch's default) ends the process."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=timeout) if timeout else None
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    else:
        dist.init_process_group(backend, timeout=limit)


def make_mesh(device: torch.device, world: World, shard: str) -> DeviceMesh:
    """All ranks in a row; with `shard="node"` nodes × ranks of a node, where parameters are copied over the first
    dimension and sharded over the second.

    Raises:
        Mistake: nodes with different numbers of ranks.
    """
    if shard == "all" or world.local_size in (0, world.size):
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    if world.size % world.local_size:
        raise Mistake(
            f"strategy.shard=node: {world.size} ranks do not fall into nodes of {world.local_size}; use shard=all"
        )
    shape = (world.size // world.local_size, world.local_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
