"""Job and site → the text of its batch script (pure; the template is `slurm/job.sbatch.j2`)."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from launcher.checks import ranks_of
from xlstm_distill.contract.data import data_folder
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.schema import Cluster
from xlstm_distill.contract.state import TRAINING

RETRIES = 3
"""Restarts of a crashing job without a new checkpoint."""


@dataclass(frozen=True)
class Site:
    """What a script needs to know beside the job and the cluster's settings."""

    run: str
    """Name of the run."""
    folder: Path
    """The run folder, absolute."""
    python: str
    """Interpreter on the compute nodes."""
    code: Path
    """Folder that holds the `xlstm_distill` package that the job runs."""
    threads: int = 0
    """CPU threads per rank; 0: the cores of a task."""


def elements_of(job: Job) -> int:
    """Array elements that share a job's pieces: one per piece."""
    return max(1, len(job.pieces))


def array_of(job: Job) -> str:
    """Value of `--array`: one element per piece, or time segments one after another; empty: a plain job."""
    if job.stage in TRAINING and job.placement.segments > 1:
        return f"0-{job.placement.segments - 1}%1"
    return f"0-{elements_of(job) - 1}" if elements_of(job) > 1 else ""


def render(job: Job, cluster: Cluster, site: Site) -> str:
    """The batch script of a job. Every value is quoted for the shell.

    Raises:
        Mistake: a value with a newline or a NUL.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    place = job.placement
    folder = site.folder / "jobs" / job.name
    options = {
        "partition": place.partition or cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    values = {
        "job_name": quote(f"{site.run}.{job.name}"),
        "output": quote(pattern(folder / "logs" / "slurm-%j.log")),
        "rank_log": quote(pattern(folder / "logs" / "rank-%t.log")),
        "nodes": place.nodes,
        "tasks_per_node": ranks_of(place) // place.nodes,
        "cpus_per_task": place.cpus_per_task,
        "gpus_per_node": place.gpus_per_node,
        "gpu_flag": cluster.gpu_flag,
        "memory": quote(place.memory) if place.memory else "",
        "time": quote(place.time),
        "signal_seconds": cluster.signal_seconds,
        "array": array_of(job),
        "elements": 1 if job.stage in TRAINING else elements_of(job),
        "segments": place.segments if job.stage in TRAINING else 1,
        "site": [(flag, quote(value)) for flag, value in options.items() if value],
        "job_folder": quote(str(folder)),
        "python": quote(site.python),
        "code": quote(str(site.code)),
        "threads": site.threads or place.cpus_per_task,
        "setup": [line for block in cluster.setup for line in block.splitlines()],
        "retries": RETRIES,
    }
    environment = Environment(
        loader=FileSystemLoader(data_folder("slurm")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("job.sbatch.j2").render(values)


def quote(value: str) -> str:
    """`value` as one word for the shell and for `#SBATCH` lines.

    Raises:
        Mistake: it holds a newline or a NUL, which no quoting carries through `#SBATCH`.
    """
    if any(sign in value for sign in "\n\r\0"):
        raise Mistake(f"{value!r}: a line break or a NUL cannot stand in a batch script")
    return shlex.quote(value)


def pattern(path: Path) -> str:
    """`path` as a Slurm file name pattern: only the last part's % is a pattern."""
    return f"{str(path.parent).replace('%', '%%')}/{path.name}"
