"""What `xdl plan` prints: a tree of jobs with what each takes, memory by part, disk by kind; or JSON (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.caching import Caching
from launcher.checks import ranks_of
from launcher.estimate import MFU, Estimate, device_of
from launcher.memory import PARTS
from launcher.parameters import sizes
from launcher.plan import Graph
from launcher.progress import short
from launcher.runs import run_name
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.state import TRAINING

NOTHING = "–"


def plan_text(
    graph: Graph, found: Sequence[Estimate], config: Config, folder: Path, choices: Caching | None = None
) -> str:
    """The whole plan."""
    blocks = [
        head_text(config, folder),
        tree_text(graph, found),
        memory_text(found),
        caching_text(choices) if choices else "",
        "\n".join([*disk_lines(found), *host_lines(found), *warnings(found), *_wide(config)]),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def head_text(config: Config, folder: Path) -> str:
    """Run, student, and what the figures assume."""
    counts, device = sizes(config.teacher, config.student), device_of(config)
    gpus = any(place.gpus_per_node for place in config.cluster.stages.values())
    lines = [
        f"run {run_name(config)} in {folder} on {config.cluster.kind}",
        f"student: {short(counts.total)} parameters, {short(counts.new)} of them new; samples of "
        f"{config.data.sequence} tokens; strategy {config.strategy.name}, {config.strategy.precision}",
    ]
    if gpus:
        lines.append(
            f"GPUs: {config.cluster.gpu}, {device.memory:.0f} GB, {device.flops / 1e12:.4g} TFLOP/s in bfloat16; "
            f"hours: at an assumed MFU of {MFU:.2f}, or (=) at the pace that the job itself has measured"
        )
    else:
        lines.append("hours: at an assumed speed of the processor, or (=) at the pace that the job itself has measured")
    return "\n".join(lines)


def tree_text(graph: Graph, found: Sequence[Estimate]) -> str:
    """One line per job, below the last of its inputs."""
    by_name = {estimate.job.name: estimate for estimate in found}
    rows: list[tuple[str, ...]] = [
        ("job", "state", "nodes × ranks", "hours", "segments", "tokens", "steps", "GB/rank", "checkpoint", "disk", "")
    ]
    rows += [_row(branch + name, by_name[name], also) for branch, name, also in branches(graph)]
    return _table(rows, left=(0, 1, 10))


def branches(graph: Graph) -> list[tuple[str, str, tuple[str, ...]]]:
    """For each job in the order of the tree, below the last of its inputs: what is drawn before its name, its name, and
    those of its inputs that do not come before that one anyway."""
    inside = {job.name: [name for name in job.inputs if name in graph.names] for job in graph}
    parent = {name: max(inputs, key=graph.names.index, default="") for name, inputs in inside.items()}
    before: dict[str, set[str]] = {"": set()}
    for name in graph.names:  # inputs come first
        before[name] = {name}.union(*(before[i] for i in inside[name]))
    found: list[tuple[str, str, tuple[str, ...]]] = []

    def walk(name: str, branch: str, below: str) -> None:
        found.append((branch, name, tuple(i for i in inside[name] if i not in before[parent[name]])))
        children = [child for child in graph.names if parent[child] == name]
        for child in children:
            last = child == children[-1]
            walk(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))

    for root in (name for name in graph.names if not parent[name]):
        walk(root, "", "")
    return found


def _row(name: str, e: Estimate, also: Sequence[str]) -> tuple[str, ...]:
    place = e.job.placement
    hours = NOTHING if e.hours is None or e.state.done else f"{'=' if e.measured else ''}{_hours(e.hours)}"
    return (
        name,
        e.state.kind,
        f"{place.nodes} × {ranks_of(place) // place.nodes}",
        hours,
        _segments(e),
        short(e.tokens) if e.tokens else NOTHING,
        str(e.steps) if e.steps else NOTHING,
        f"{e.memory.total / 1e9:.1f}" if e.memory else NOTHING,
        _size(e.checkpoint),
        _size(e.disk.total),
        f"after {', '.join(also)} too" if also else (f"({e.state.reason})" if e.state.reason else ""),
    )


def _segments(e: Estimate) -> str:
    if e.hours is None or e.state.done:
        return NOTHING
    given = e.job.placement.segments if e.job.stage in TRAINING else 1
    return f"{e.segments} of {given}"


def _hours(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.1 else f"{hours:.2f}"


def _size(size: float) -> str:
    """Bytes in MB, GB or TB of 10³ each."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1e3 * scale else f"{size / scale:,.0f} {unit}"
    return f"{size / 1e6:.3g} MB" if size else NOTHING


def memory_text(found: Sequence[Estimate]) -> str:
    """GB of a rank at its highest moment, by part; jobs that take the same share a line."""
    jobs: dict[Any, list[str]] = {}
    for estimate in found:
        if estimate.memory and not estimate.state.done:
            jobs.setdefault(estimate.memory, []).append(estimate.job.name)
    used = [part for part in PARTS if any(getattr(memory, part) for memory in jobs)]
    rows = [("GB of a rank", *used, "total")]
    rows += [
        (", ".join(names), *(f"{getattr(memory, part) / 1e9:.2f}" for part in used), f"{memory.total / 1e9:.2f}")
        for memory, names in jobs.items()
    ]
    return _table(rows, left=(0,)) if jobs else ""


def caching_text(found: Caching) -> str:
    """The ways to get the teacher's targets beside each other, the run's marked, and from when on caching pays."""
    rows = [("teacher's targets", "bytes/token", "disk", "rank-hours: capture", "and Stage II", "")]
    for choice in found.choices:
        stored = choice.name != "online"
        numbers = (f"{choice.bytes_per_token:.0f}", _size(choice.disk), _hours(choice.capture))
        mark = "(this plan)" if choice.chosen else ""
        rows.append((choice.name, *(numbers if stored else (NOTHING,) * 3), _hours(choice.rank_hours), mark))
    told = (
        f"{short(found.cached)} tokens to cache, each drawn {found.passes:.1f} times; caching takes fewer rank-hours "
        f"than the online teacher where that is more than {found.break_even:.1f}"
    )
    return _table(rows, left=(0, 5)) + "\n" + told


def disk_lines(found: Sequence[Estimate]) -> list[str]:
    """What is to be written, by kind."""
    todo = [estimate for estimate in found if not estimate.state.done]
    kinds = {
        "text and token shards": sum(e.disk.shards for e in todo),
        "teacher's targets": sum(e.disk.targets for e in todo),
        "checkpoints": sum(e.disk.checkpoint * e.disk.checkpoints for e in todo),
        "models": sum(e.disk.models for e in todo),
    }
    told = ", ".join(f"{name} {_size(size)}" for name, size in kinds.items() if size)
    return [f"disk: at least {_size(sum(kinds.values()))} ({told})"] if told else []


def host_lines(found: Sequence[Estimate]) -> list[str]:
    """Memory of the nodes that is taken beside the GPUs'."""
    jobs: dict[str, list[str]] = {}
    for estimate in found:
        if estimate.host and not estimate.state.done:
            jobs.setdefault(_size(estimate.host), []).append(estimate.job.name)
    told = "; ".join(f"{size} ({', '.join(names)})" for size, names in jobs.items())
    return [f"memory of a node for copies of the training state: {told}"] if told else []


def warnings(found: Sequence[Estimate]) -> list[str]:
    """Jobs that their time limit does not hold."""
    lines = []
    for e in found:
        given = e.job.placement.segments if e.job.stage in TRAINING else 1
        if e.hours is not None and e.segments > given and not e.state.done:
            key = f"cluster.stages.{e.job.stage}"
            more = f"{key}.segments={e.segments} or more" if e.job.stage in TRAINING else f"{key} more GPUs or time"
            limit = f"{given} × {e.job.placement.time}"
            lines.append(f"warning: {e.job.name}: {_hours(e.hours)} hours do not fit {limit}; give {more}")
    return lines


def _wide(config: Config) -> list[str]:
    """Said where a window leaves the recurrence nothing to do."""
    window, length = config.student.reach, config.data.sequence
    if 0 < length <= window:
        return [
            f"warning: student.window={window} holds all of data.sequence={length}: nothing will need the recurrence"
        ]
    return []


def _table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Columns side by side; those of `left` begin together, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(c.ljust(w) if n in left else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def plan_json(
    found: Sequence[Estimate], config: Config, folder: Path, refused: Sequence[str], choices: Caching | None = None
) -> dict[str, Any]:
    """The same as values; sizes in bytes, what is not foretold null."""
    counts, device = sizes(config.teacher, config.student), device_of(config)
    return {
        "run": run_name(config),
        "folder": str(folder),
        "cluster": config.cluster.kind,
        "parameters": {"total": counts.total, "new": counts.new, "teacher": counts.teacher},
        "gpu": {"name": config.cluster.gpu, "flops": device.flops, "memory": device.memory * 1e9},
        "mfu": MFU,
        "caching": asdict(choices) if choices else None,
        "jobs": [_job_json(e, e.job) for e in found],
        "refused": list(refused),
    }


def _job_json(e: Estimate, job: Job) -> Mapping[str, Any]:
    memory = {**asdict(e.memory), "total": e.memory.total} if e.memory else None
    return {
        "name": job.name,
        "stage": job.stage,
        "state": e.state.kind,
        "inputs": list(job.inputs),
        "nodes": job.placement.nodes,
        "gpus_per_node": job.placement.gpus_per_node,
        "tokens": e.tokens or None,
        "steps": e.steps or None,
        "hours": e.hours,
        "measured": e.measured,
        "time": job.placement.time,
        "segments": e.segments if e.hours is not None else None,
        "segments_given": job.placement.segments if job.stage in TRAINING else 1,
        "memory": memory,
        "node_memory": e.host,
        "checkpoint": e.checkpoint,
        "disk": {**asdict(e.disk), "total": e.disk.total},
    }
