"""Ranks that run at the same time over the same packed shards share each global batch among them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import free_port

from xlstm_distill.data.shards import sample, shard_writer
from xlstm_distill.data.stream import Part, SampleStream

RANK = """
import json, os, sys
import torch, torch.distributed as dist
from pathlib import Path
from xlstm_distill.data.stream import Part, SampleStream

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
parts = [Part(Path(sys.argv[1]) / "a", 0.75), Part(Path(sys.argv[1]) / "b", 0.25)]
stream = SampleStream(parts, batch=8, seed=3, rank=rank, world=world)
if len(sys.argv) > 2:
    stream.load_state_dict(json.loads(sys.argv[2]))
batches = []
for _ in range(12):
    mine = next(stream).tokens[:, 0].contiguous()
    shares = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(shares, mine)
    batches.append(torch.cat(shares).tolist())
if rank == 0:
    print(json.dumps({"batches": batches, "state": stream.state_dict()}))
dist.destroy_process_group()
"""


def run_ranks(world: int, root: Path, port: int, *more: str) -> dict:
    environment = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(root), *more],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world
    return json.loads(outputs[0])


@pytest.mark.dist
def test_two_processes_see_what_one_sees_and_one_goes_on_where_two_stopped(tmp_path):
    for name, count, first in (("a", 23, 0), ("b", 11, 100)):
        with shard_writer(tmp_path / name, 8, 400) as writer:
            for number in range(first, first + count):
                writer.write(sample(*[np.full(9, number)] * 3))
    before = set(os.listdir("/dev/shm"))
    two = run_ranks(2, tmp_path, free_port())
    parts = [Part(tmp_path / "a", 0.75), Part(tmp_path / "b", 0.25)]
    alone = SampleStream(parts, batch=8, seed=3)
    assert two["batches"] == [next(alone).tokens[:, 0].tolist() for _ in range(12)]
    assert two["state"] == alone.state_dict()
    further = run_ranks(2, tmp_path, free_port(), json.dumps(two["state"]))
    assert further["batches"] == [next(alone).tokens[:, 0].tolist() for _ in range(12)]
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.endswith(("_locals", "_barrier"))]
