"""`python -m xlstm_distill checkup FOLDER`, as one of the ranks of a short job: what this rank's node has, and how fast
and how right it computes and speaks with the others. `xdl doctor --nodes N` compares.

FOLDER/reports/rank-R.json is written twice: with what the rank finds by itself, and with what it finds with the others.
"""

import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.job import World

PATIENCE = 60.0
"""Seconds that a collective waits for the others."""
REPORTS = "reports"
MATRIX = 512
"""Side of the matrices whose product is checked against an exact one."""
REPEATS = 5


def main(arguments: list[str]) -> int:
    """Check this rank and write its report; 0 when all of it could be measured."""
    world = World.from_environment()
    path = Path(arguments[0]) / REPORTS / f"rank-{world.rank}.json"
    report: dict[str, Any] = {"rank": world.rank, "node": node_name(), "finished": False}
    try:
        report |= alone()
        write_json(path, report)
        report |= together(world)
    except Exception as error:
        traceback.print_exc()
        report["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    write_json(path, {**report, "finished": True})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if "error" in report else 0)  # a process group whose peers are gone may hang or abort


def node_name() -> str:
    """The name by which the scheduler knows this node."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def alone() -> dict[str, Any]:
    """Versions, and a product of matrices: whether it is right, and FLOP/s."""
    import torch

    from xlstm_distill.runtime.device import measured_peak

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(World.from_environment().local_rank % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    return {
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "product": product(device),
        "flops": measured_peak(device, dtype),
    }


def versions() -> dict[str, str]:
    """Name → version of what has to be the same on all nodes."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": _package("transformers")}
    if torch.version.cuda and torch.cuda.is_available():
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        found["driver"] = _driver()
    return found


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(iter(answer.stdout.split()), "unknown")


def product(device: Any) -> str:
    """`right`, or what is wrong with a product of matrices of small whole numbers, which float32 gives exactly."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-8, 9, (MATRIX, MATRIX), generator=generator) for _ in range(2))
    made = (left.to(device, torch.float32) @ right.to(device, torch.float32)).cpu()
    if not bool(torch.isfinite(made).all()):
        return "NaN or infinite"
    return "right" if bool((made == (left @ right)).all()) else "wrong"


def together(world: World) -> dict[str, Any]:
    """Bytes/s of an all-reduce over all ranks and of the links between neighbouring nodes, and by how many seconds this
    node's clock is ahead of rank 0's."""
    import torch
    import torch.distributed as dist

    from xlstm_distill.parallel.group import join

    join(world, PATIENCE)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    nodes: list[Any] = [None] * world.size
    dist.all_gather_object(nodes, node_name())
    firsts = list({node: rank for rank, node in reversed(list(enumerate(nodes)))}.values())
    firsts.sort()
    return {
        "all_reduce": all_reduce_speed(torch.ones((64 if cuda else 4) << 18, device=device), world.size),
        "links": link_speeds(torch.ones((32 if cuda else 2) << 18, device=device), firsts, nodes, world.rank),
        "skew": clock_skew(firsts, world.rank),
    }


def all_reduce_speed(data: Any, ranks: int) -> float:
    """Bytes/s over each rank's connection (NCCL's bus bandwidth: twice the bytes · (ranks − 1) ÷ ranks); 0: alone."""
    import torch.distributed as dist

    seconds = [_timed(lambda: dist.all_reduce(data), data) for _ in range(REPEATS)]
    return 2 * data.nbytes * (ranks - 1) / ranks / min(seconds[1:])


def link_speeds(data: Any, firsts: list[int], nodes: list[str], rank: int) -> dict[str, float]:
    """Neighbouring node → bytes/s to it and back, measured by the first rank of each node, every second pair at a time
    so that no node is in two."""
    import torch.distributed as dist

    found = {}
    for pairs in rounds(firsts):
        dist.barrier()
        for low, high in pairs:
            if rank not in (low, high):
                continue
            there = low + high - rank
            swap = [dist.send, dist.recv] if rank == low else [dist.recv, dist.send]
            seconds = [_timed(lambda: [turn(data, there) for turn in swap], data) for _ in range(REPEATS)]  # noqa: B023
            found[nodes[there]] = 2 * data.nbytes / min(seconds[1:])
    return found


def rounds(firsts: list[int]) -> Iterator[list[tuple[int, int]]]:
    """The pairs of neighbours in a ring, in rounds in which each stands once at most."""
    count = len(firsts)
    ring = [(at, (at + 1) % count) for at in range(count if count > 2 else count - 1)]
    last = [ring.pop()] if count > 2 and count % 2 else []
    for pairs in (ring[::2], ring[1::2], last):
        yield [(firsts[a], firsts[b]) for a, b in pairs]


def _timed(what: Any, data: Any) -> float:
    import torch

    _wait = torch.cuda.synchronize if data.is_cuda else lambda: None
    _wait()
    began = time.perf_counter()
    what()
    _wait()
    return time.perf_counter() - began


def clock_skew(firsts: list[int], rank: int) -> float | None:
    """Seconds that this node's clock is ahead of rank 0's, by the fastest of a few round trips; None: not asked."""
    import torch
    import torch.distributed as dist

    told: Mapping[float, float] = {}
    for first in (one for one in firsts if one):
        for _ in range(REPEATS):
            if rank == first:
                sent, answer = time.time(), torch.zeros(1, dtype=torch.float64)
                dist.send(answer, 0)
                dist.recv(answer, 0)
                now = time.time()
                told = {**told, now - sent: (now + sent) / 2 - float(answer)}
            elif rank == 0:
                asked = torch.zeros(1, dtype=torch.float64)
                dist.recv(asked, first)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), first)
    return told[min(told)] if told else (0.0 if rank == 0 else None)
