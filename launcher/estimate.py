"""Configuration → hours, memory and disk of every job, and what cannot fit (formulas: docs/planning.md).

Pure but for three looks at the run folder: the pace that a job has measured itself, how much text local files and
finished shards hold, and what lies there already.
"""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.activations import setting_of
from launcher.budget import shortages
from launcher.checks import ranks_of, seconds
from launcher.disk import Disk, disk_of, present, tokens_of
from launcher.memory import PARTS, STATE, Memory, peak
from launcher.parameters import sizes
from launcher.plan import Graph
from launcher.progress import last_record
from launcher.render import elements_of
from xlstm_distill.contract import ledger
from xlstm_distill.contract.devices import Device, find_device
from xlstm_distill.contract.files import read_lines
from xlstm_distill.contract.flops import step_flops
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.state import TRAINING, State
from xlstm_distill.merge.candidates import candidates

MFU = 0.3
"""Share of the peak that a step is assumed to reach on GPUs, until a job has measured its own. Dense models of these
sizes reach .35 to .45 under FSDP with recomputation; this student's mixers have not been timed on GPUs."""
CPU_MFU = 0.6
"""The same on CPUs: the demo's two stages reach .5 to .7 of `CORE_FLOPS`."""
CORE_FLOPS = 100e9
"""FLOP/s in float32 of a core: 2 × 16 multiplications with addition per cycle, at some 3 GHz."""
LINEAR, RELATIVES = 3.5e8, 4e7
"""Elements of all experts per second that a search merges on the CPU: the mean, and TIES or DARE (two cores)."""
FLOAT32_SHARE = 1 / 16
"""Of a GPU's bfloat16 peak, in float32: A100 19.5 of 312 TFLOP/s, H100 67 of 989."""
WITH_MODELS = (*TRAINING, "cache")
"""Stages whose hours and memory are foretold; the others are short, or follow the network and the tasks."""
RESERVE = 1e9
"""Bytes of host memory that a process holds besides: Python, torch and its threads."""


@dataclass(frozen=True)
class Estimate:
    """What one job takes. None: not foretold."""

    job: Job
    state: State
    tokens: int
    """Of training or caching; 0: none."""
    steps: int
    hours: float | None
    """Of what is left to do; of an array's longest element."""
    measured: bool
    """Whether the hours come from the job's own pace."""
    segments: int
    """Of its time limit that the hours take."""
    memory: Memory | None
    """Of a rank, at its highest moment."""
    host: float
    """Bytes of a node's memory that copies for checkpoints and offloaded state take, beside GPUs."""
    checkpoint: float
    """Bytes of one checkpoint."""
    disk: Disk


def estimates(graph: Graph, config: Config, folder: Path, standing: Mapping[str, State]) -> list[Estimate]:
    """One per job of the graph, in its order.

    Args:
        graph: of `launcher.plan`.
        config: settled (`cluster=auto` resolved).
        folder: of the run.
        standing: of `launcher.plan.states`.
    """
    tokens = tokens_of(config, folder)
    return [_estimate(job, config, folder, standing[job.name], tokens) for job in graph]


def _estimate(job: Job, config: Config, folder: Path, state: State, tokens: Mapping[str, float]) -> Estimate:
    place, path = job.placement, folder / "jobs" / job.name
    steps, count = _work(job, config, tokens)
    hours, measured = (0.0, False) if state.done else _hours(job, config, path, steps, tokens)
    limit = max(1, seconds(place.time) - config.cluster.signal_seconds)
    # A teacher's file may leave its shape out, and the formulas are the hybrid's.
    known = config.teacher.num_hidden_layers > 0 and config.student.kind == "hybrid"
    memory = peak(config, job.stage, place.nodes, place.gpus_per_node) if known and job.stage in WITH_MODELS else None
    disk = disk_of(job, config, tokens, steps)
    return Estimate(
        job=job,
        state=state,
        tokens=count,
        steps=steps,
        hours=hours,
        measured=measured,
        segments=max(1, math.ceil(3600 * hours / limit)) if hours is not None else 1,
        memory=memory,
        host=_host(job, config),
        checkpoint=disk.checkpoint,
        disk=disk,
    )


def _work(job: Job, config: Config, tokens: Mapping[str, float]) -> tuple[int, int]:
    """Steps and tokens of a job."""
    if job.stage in TRAINING and job.tokens:
        step = getattr(config, job.stage).batch * config.data.sequence
        steps = max(1, job.tokens // step)
        return steps, steps * step
    if job.stage == "cache":
        return 0, int(sum(tokens[f"cached {piece}"] for piece in job.pieces))
    return 0, 0


def device_of(config: Config) -> Device:
    """The GPUs of the cluster. `launcher.checks` has refused a name that the table does not know."""
    device = find_device(config.cluster.gpu)
    assert device is not None
    return device


def speed(job: Job, config: Config) -> float:
    """FLOP/s that a job's ranks are assumed to make together."""
    place = job.placement
    if not place.gpus_per_node:
        cores = place.cpus_per_task if config.cluster.kind != "local" else len(os.sched_getaffinity(0))
        return place.nodes * cores * CORE_FLOPS * CPU_MFU
    share = 1.0 if config.strategy.precision == "bfloat16" else FLOAT32_SHARE
    return ranks_of(place) * device_of(config).flops * share * MFU


def _hours(job: Job, config: Config, path: Path, steps: int, tokens: Mapping[str, float]) -> tuple[float | None, bool]:
    """Of what is left, and whether the job has measured its own pace."""
    sequence = config.data.sequence
    if job.stage in TRAINING:
        record = last_record(path)
        if pace := record.get("pace"):
            starts = ledger.starts(path)
            ranks = starts[-1].get("ranks") if starts else None
            # On other ranks than it was measured on: as if every rank did its share as fast.
            left = max(0, steps - int(record.get("step", 0)))
            return pace * left * (ranks or ranks_of(job.placement)) / ranks_of(job.placement) / 3600, True
        if config.student.kind != "hybrid":
            return None, False  # an sLSTM goes step by step: its operations say nothing about its time
        online = job.stage == "distill" and config.distill.targets == "online"
        stage: Any = job.stage
        flops = step_flops(stage, config.teacher, config.student, sequence, online=online).total
        step = getattr(config, job.stage).batch * sequence
        return flops * steps * step / speed(job, config) / 3600, False
    if job.stage == "cache":
        flops = step_flops("distill", config.teacher, config.student, sequence, online=True).teacher
        pieces = [tokens[f"cached {piece}"] for piece in job.pieces] or [0.0]
        # On Slurm an element per piece; here one after the other.
        count = max(pieces) if config.cluster.kind != "local" and elements_of(job) > 1 else sum(pieces)
        return flops * count / speed(job, config) / 3600, False
    if job.stage == "merge" and config.merge.search:
        return _search_hours(job, config, path), False
    return None, False


def _search_hours(job: Job, config: Config, path: Path) -> float | None:
    """Of the candidates that are left: each is merged, and asked on the held-out sequences. None where tasks are asked
    too, or where a student's operations are not known."""
    teacher, merge = config.teacher, config.merge
    if merge.tasks or config.student.kind != "hybrid" or not teacher.num_hidden_layers:
        return None
    sequence, kept = config.data.sequence, len(read_lines(path / "checkpoints/search.jsonl"))
    left = candidates(config.specialists, merge.search, merge.tried)[kept:]
    flops = step_flops("distill", teacher, config.student, sequence, online=True)
    head = 2.0 * teacher.hidden_size * teacher.vocab_size  # the teacher's, whose hidden states are kept
    asked = config.eval.samples * len(config.sources) * sequence * (len(left) * (flops.forward + head) + flops.teacher)
    elements = len(config.specialists) * sizes(teacher, config.student).total
    merged = sum(elements / (LINEAR if candidate.method == "linear" else RELATIVES) for candidate in left)
    return (asked / speed(job, config) + merged) / 3600


def _host(job: Job, config: Config) -> float:
    """Bytes of a node's memory: copies of the ranks' parts of the training state; with offload parameters, master and
    moments too."""
    place = job.placement
    if job.stage not in TRAINING or not place.gpus_per_node:
        return 0.0
    s = setting_of(config, job.stage, place.nodes, place.gpus_per_node)
    c = sizes(config.teacher, config.student)
    trained = c.aligned if job.stage == "align" else c.trained / s.shards
    offloaded = config.strategy.offload and job.stage == "distill"
    return place.gpus_per_node * (STATE * trained + offloaded * (STATE + 4 + s.product) * c.total / s.shards)


def refusals(found: list[Estimate], config: Config, folder: Path) -> list[str]:
    """One line per thing that cannot fit: memory of jobs that are still to run, the disk of the run folder, and tokens
    that it holds for trainings that draw more.

    Args:
        found: of `estimates`.
        config: settled.
        folder: of the run.
    """
    short = shortages([(estimate.job, estimate.state) for estimate in found], config, folder / "jobs")
    return [*memory_refusals(found, config), *disk_refusals(found, folder), *short]


def memory_refusals(found: list[Estimate], config: Config) -> list[str]:
    """Jobs whose ranks do not fit the GPUs, or on this machine its memory. Equal jobs share a line."""
    lines: dict[str, list[str]] = {}
    for estimate in found:
        if estimate.memory is None or estimate.state.done:
            continue
        if line := _too_much(estimate, config):
            lines.setdefault(line, []).append(estimate.job.name)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]


def _too_much(estimate: Estimate, config: Config) -> str:
    assert estimate.memory is not None
    place, memory, stage = estimate.job.placement, estimate.memory, estimate.job.stage
    if place.gpus_per_node:
        need, room = memory.total, device_of(config).memory * 1e9
        where = f"GB per GPU, and an {config.cluster.gpu} holds {room / 1e9:.0f}"
    elif config.cluster.kind == "local":
        need, room = ranks_of(place) * (memory.total + RESERVE), _host_memory()
        where = f"GB of memory, and this machine has {room / 1e9:.0f}"
    else:
        return ""
    if need <= room:
        return ""
    most = max(PARTS, key=lambda part: float(getattr(memory, part)))
    told = f"needs {need / 1e9:.1f} {where} (most: {most}, {getattr(memory, most) / 1e9:.1f} GB)"
    if stage == "cache":
        more = "more GPUs (cluster.stages.cache.gpus_per_node)"
        advice = f"{more}, distill.targets=online" if most == "weights" else f"a smaller cache.micro_batch, {more}"
        return f"{told}; try {advice}, or --force"
    recompute = stage == "distill" and not config.strategy.activation_checkpointing
    found = ["strategy.activation_checkpointing=true"] if recompute else []
    found += [f"{stage}.micro_batch=1"] if getattr(config, stage).micro_batch > 1 else []
    return f"{told}; try {', '.join([*found, 'more GPUs', 'another cluster.gpu'])}, or --force"


def disk_refusals(found: list[Estimate], folder: Path) -> list[str]:
    """Whether what is still to be written fits the file system of the run folder."""
    todo = [estimate for estimate in found if not estimate.state.done]
    need = sum(max(0.0, e.disk.total - present(folder / "jobs" / e.job.name)) for e in todo)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if need <= free:
        return []
    most = max(todo, key=lambda estimate: estimate.disk.total)
    advice = "distill.targets=online" if most.job.stage == "cache" else "another runs=FOLDER"
    return [
        f"{folder}: at least {need / 1e9:,.0f} GB are to be written and {free / 1e9:,.0f} GB are free there (most: "
        f"{most.job.name}, {most.disk.total / 1e9:,.0f} GB); try {advice}, or --force"
    ]


def _host_memory() -> float:
    """Bytes of this machine; without limit where /proc does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    except (OSError, StopIteration):
        return math.inf
