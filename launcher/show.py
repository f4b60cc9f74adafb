"""What `xdl config` and `xdl launch --dry-run` print (pure but for the interpreter's path)."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from launcher.backends import local, slurm
from launcher.checks import ranks_of
from launcher.compose import Resolved
from launcher.plan import Graph
from launcher.render import render
from xlstm_distill.contract.job import Job, JobFolder, plain
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.state import State

COLUMN = 56
"""Where the origins stand in `xdl config`."""


def config_text(resolved: Resolved) -> str:
    """The configuration as YAML, each value with its origin as a comment."""
    return "\n".join(_yaml(plain(asdict(resolved.config)), resolved.origins, "", 0)) + "\n"


def _yaml(value: Mapping[str, Any], origins: Mapping[str, str], prefix: str, depth: int) -> list[str]:
    lines = []
    for name, inner in value.items():
        key, indent = f"{prefix}{name}", "  " * depth
        if isinstance(inner, Mapping) and inner:
            lines += [f"{indent}{name}:", *_yaml(inner, origins, f"{key}.", depth + 1)]
        else:
            lines.append(f"{indent}{name}: {_scalar(inner)}".ljust(COLUMN) + f"  # {origins[key]}")
    return lines


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def graph_text(graph: Graph, standing: Mapping[str, State]) -> str:
    """One line per job: name, how it stands, its place, its inputs."""
    width = max(len(name) for name in graph.names)
    lines = []
    for job in graph:
        state = standing[job.name]
        place = f"{job.placement.nodes} × {ranks_of(job.placement) // job.placement.nodes}"
        inputs = f" ← {', '.join(job.inputs)}" if job.inputs else ""
        why = f" ({state.reason})" if state.reason else ""
        lines.append(f"{job.name:<{width}}  {state.kind:<8}  {place} ranks{inputs}{why}")
    return "\n".join(lines) + "\n"


def job_text(job: Job, graph: Graph, config: Config, folder: Path, standing: Mapping[str, State]) -> str:
    """What would be started for a job: its command line here, or its submission and its script, byte for byte."""
    path = folder / "jobs" / job.name
    if config.cluster.kind != "slurm" or job.stage == slurm.HERE:
        where = " (here, on the login node)" if config.cluster.kind == "slurm" else ""
        return f"--- {job.name}{where}\n{local.quoted(local.command_of(JobFolder(path, job, config)))}\n"
    ids = {name: f"${{{name}}}" for name in graph.names if not standing[name].done and graph[name].stage != slurm.HERE}
    command = " ".join(slurm.submit_command(job, folder, ids))
    return f"--- {job.name}: {command}\n{render(job, config.cluster, slurm.site_of(config, folder))}"
