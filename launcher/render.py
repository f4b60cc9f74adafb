"""Job and site → the text of its batch script (pure; the template is `slurm/job.sbatch.j2`)."""

import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.checks import ranks_of, seconds
from xlstm_distill.contract.data import data_folder
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.schema import Cluster
from xlstm_distill.contract.state import TRAINING

if TYPE_CHECKING:
    from jinja2 import Environment

RETRIES = 3
"""Restarts of a crashing job without a new checkpoint."""
MOST_STARTS = 10
"""Starts of a job, whatever ended them, without a new checkpoint."""
GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-task")
"""Options of sbatch that ask for GPUs."""


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
    mounts: tuple[str, ...] = ()
    """Folders that a container has to see, absolute."""
    provenance: tuple[str, ...] = ()
    """Lines of a comment: what made this script."""


def elements_of(job: Job) -> int:
    """Array elements that share a job's pieces: one per piece."""
    return max(1, len(job.pieces))


def array_of(job: Job) -> str:
    """Value of `--array`: one element per piece, or time segments one after another; empty: a plain job."""
    if job.stage in TRAINING and job.placement.segments > 1:
        return f"0-{job.placement.segments - 1}%1"
    return f"0-{elements_of(job) - 1}" if elements_of(job) > 1 else ""


def render(job: Job, cluster: Cluster, site: Site, signal_seconds: int = 0, template: str = "job.sbatch.j2") -> str:
    """The batch script of a job. Every value is quoted for the shell.

    Args:
        job: what runs, and where.
        cluster: the site's settings.
        site: the rest that scripts need.
        signal_seconds: what the job has measured that a stop takes; 0: unknown, the cluster's setting.
        template: file of `slurm/`.

    Raises:
        Mistake: a value with a newline or a NUL, or a container that cannot be told a folder's name.
    """
    place = job.placement
    folder = site.folder / "jobs" / job.name
    training, elements = job.stage in TRAINING, elements_of(job)
    values = {
        "job_name": quote(f"{site.run}.{job.name}"),
        "output": quote(pattern(folder / "logs" / "slurm-%j.log")),
        "rank_log": quote(pattern(folder / "logs" / rank_log(job))),
        "nodes": place.nodes,
        "tasks_per_node": ranks_of(place) // place.nodes,
        "cpus_per_task": place.cpus_per_task,
        "gpus": "".join(f"{flag}={value}" for flag, value in gpu_option(place.gpus_per_node, cluster).items()),
        "memory": quote(place.memory) if place.memory else "",
        "time": quote(place.time),
        "seconds": seconds(place.time),
        "signal_seconds": signal_seconds or cluster.signal_seconds,
        "array": array_of(job),
        "elements": 1 if training else elements,
        "segments": place.segments if training else 1,
        "site": [(flag, quote(value) if value else "") for flag, value in options_of(job, cluster).items()],
        "provenance": [_comment(line) for line in site.provenance],
        "job_folder": quote(str(folder)),
        "python": quote("python3" if cluster.container != "none" else site.python),
        "code": quote(str(site.code)),
        "threads": site.threads or place.cpus_per_task,
        "scratch": quote(cluster.scratch) if cluster.scratch else "",
        "setup": [line for block in cluster.setup for line in block.splitlines()],
        "retries": RETRIES,
        "most_starts": MOST_STARTS,
        **_container(cluster, site, bool(place.gpus_per_node)),
    }
    return _environment().get_template(template).render(values)


@cache
def _environment() -> "Environment":
    """Jinja's, kept because it keeps compiled templates."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(data_folder("slurm")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def rank_log(job: Job) -> str:
    """File name pattern of a rank's log; elements that run side by side have files of their own."""
    return "rank-%t.log" if job.stage in TRAINING or elements_of(job) == 1 else "rank-%t.element-%a.log"


def options_of(job: Job, cluster: Cluster) -> dict[str, str]:
    """The site's options of sbatch by long name, the stage's own partition among them; those about GPUs go to jobs
    with GPUs only."""
    own = {"partition": job.placement.partition} if job.placement.partition else {}
    without = () if job.placement.gpus_per_node else GPU_OPTIONS
    return {flag: value for flag, value in {**cluster.sbatch, **own}.items() if flag not in without}


def gpu_option(count: int, cluster: Cluster) -> dict[str, str]:
    """The option of sbatch that asks for so many GPUs per node; none where the site's options do in their own way."""
    if not count or cluster.gpu_flag == "none" or any(flag in cluster.sbatch for flag in GPU_OPTIONS):
        return {}
    return {cluster.gpu_flag: f"gpu:{count}" if cluster.gpu_flag == "gres" else str(count)}


def _container(cluster: Cluster, site: Site, gpus: bool) -> dict[str, str]:
    """What stands before a rank's command: options of srun (`step`), a command of its own (`inside`), and both for a
    single task outside the ranks (`one_task`)."""
    if cluster.container == "none":
        return {"step": "", "inside": "", "one_task": ""}
    if bad := [path for path in site.mounts if set(path) & set(",:")]:
        raise Mistake(f"{bad[0]}: a container cannot be told a folder with a comma or a colon in its name")
    if cluster.container == "pyxis":
        mounts = ",".join(f"{path}:{path}" for path in site.mounts)
        step = f"--container-image={quote(cluster.image)} --container-mounts={quote(mounts)} "
        return {"step": step, "inside": "", "one_task": f"srun --nodes=1 --ntasks=1 {step}"}
    binds = " ".join(f"--bind {quote(path)}" for path in site.mounts)
    inside = f"apptainer exec {'--nv ' if gpus else ''}{binds} {quote(cluster.image)} "
    return {"step": "", "inside": inside, "one_task": inside}


def _comment(line: str) -> str:
    """`line` as it may stand in a comment."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)


def quote(value: str) -> str:
    """`value` as one word for the shell and for `#SBATCH` lines.

    Raises:
        Mistake: it holds a newline or a NUL, which no quoting carries through `#SBATCH`.
    """
    if any(sign in value for sign in "\n\r\0"):
        raise Mistake(f"{value!r}: a line break or a NUL cannot stand in a batch script")
    return shlex.quote(value)


def pattern(path: Path) -> str:
    """`path` as a Slurm file name pattern: only the last part's % is a pattern.

    Raises:
        Mistake: a backslash is in it, which Slurm takes out of the names of files.
    """
    if "\\" in str(path):
        raise Mistake(f"{path}: Slurm cannot write logs below a name with a backslash; choose another folder or --name")
    return f"{str(path.parent).replace('%', '%%')}/{path.name}"
