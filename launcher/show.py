"""What `xdl config` and `xdl launch --dry-run` print (pure but for the interpreter's path)."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from launcher.backends import local, slurm
from launcher.compose import Resolved
from launcher.plan import Graph
from xlstm_distill.contract.job import Job, plain
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


def door_of(config: Config) -> slurm.Door:
    """How this configuration's jobs get into the queue."""
    from launcher.backends import submitit

    return submitit.Submitit() if config.cluster.kind == "submitit" else slurm.Sbatch()


def job_text(
    job: Job,
    graph: Graph,
    config: Config,
    folder: Path,
    standing: Mapping[str, State],
    command: str,
    queued: Mapping[str, str],
) -> str:
    """What would be started for a job: its command line here, or its submission and its script, byte for byte; ids that
    only the submission gives stand as `${NAME}`."""
    wanted = slurm.wanted_folder(job, config, folder)
    if config.cluster.kind == "local" or job.stage == slurm.HERE:
        where = " (here, on the login node)" if config.cluster.kind != "local" else ""
        return f"--- {job.name}{where}\n{local.quoted(local.command_of(wanted))}\n"
    made = [name for name in graph.names if not standing[name].done and graph[name].stage != slurm.HERE]
    ids = {name: queued.get(name, f"${{{name}}}") for name in made}
    site = slurm.site_of(config, folder, command)
    if config.cluster.kind == "submitit":  # it quotes a word with a $ in it
        script = door_of(config).script(wanted, site, {name: f"@{name}@" for name in ids})
        for name, id in ids.items():
            script = script.replace(f"@{name}@", id)
        return f"--- {job.name}: submitit\n{script}"
    script = door_of(config).script(wanted, site, ids)
    words = slurm.submit_command(job, config.cluster, folder, ids)
    submission = " ".join(word if "${" in word else shlex.quote(word) for word in words)
    return f"--- {job.name}: {submission}\n{script}"
