"""Jobs on a Slurm cluster through submitit's AutoExecutor: the same folders, arrays and dependencies as with sbatch.

The stage runs in submitit's own process, one per rank. What a stop leaves to do is submitit's: it requeues a preempted
job, and one at its time limit as often as the job has further time segments. A crash is not started again; the same
launch is.
"""

import os
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.backends import slurm
from launcher.backends.queue import clean_environment, script_path
from launcher.checks import ranks_of, seconds
from launcher.render import Site, elements_of, gpu_option, options_of
from xlstm_distill.contract.exitcode import DONE, STOPPED, Mistake
from xlstm_distill.contract.files import write_atomic
from xlstm_distill.contract.job import Job, JobFolder
from xlstm_distill.contract.schema import Cluster
from xlstm_distill.contract.state import TRAINING

OF_SUBMITIT = (
    "account",
    "comment",
    "constraint",
    "exclude",
    "exclusive",
    "gres",
    "nodelist",
    "partition",
    "qos",
    "wckey",
)
"""Options of sbatch that submitit has parameters for."""
GPU_PARAMETERS = {"gres": "slurm_gres", "gpus-per-node": "gpus_per_node"}
"""Option of sbatch that asks for GPUs → AutoExecutor's parameter."""


class Stage:
    """What submitit pickles and calls on every rank: runs the stage of a job folder in this process."""

    def __init__(self, folder: str, elements: int) -> None:
        self.folder, self.elements = folder, elements

    def __call__(self, element: int) -> None:
        """Run to the manifest; a stop with its checkpoint written goes to submitit's handler, which requeues."""
        import submitit

        place = submitit.JobEnvironment()
        os.environ |= {
            "RANK": str(place.global_rank),
            "WORLD_SIZE": str(place.num_tasks),
            "LOCAL_RANK": str(place.local_rank),
            "LOCAL_WORLD_SIZE": str(place.num_tasks // place.num_nodes),
            "XDL_LOGS": f"{self.folder}/logs",
        }
        if scratch := os.environ.get("XDL_SCRATCH"):
            Path(scratch).mkdir(parents=True, exist_ok=True)
            os.environ |= {"TMPDIR": scratch, "TRITON_CACHE_DIR": f"{scratch}/triton"}
            os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor"}
        if self.elements > 1:
            os.environ |= {"XDL_ELEMENT": str(element), "XDL_ELEMENTS": str(self.elements)}
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's; the stage installs its own
        code = _run(self.folder)
        if place.global_rank == 0:
            _note(Path(self.folder), place.job_id, code)
        if code == STOPPED and not (Path(self.folder) / "stop").exists() and callable(requeue):
            requeue(signal.SIGUSR2, None)
        elif code != DONE:
            raise SystemExit(code)

    def checkpoint(self, element: int) -> Any:
        """What submitit starts after a requeue: the same; all that is to be kept is in the job folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, element)


def _run(folder: str) -> int:
    from xlstm_distill.__main__ import redirect
    from xlstm_distill.stages import main

    redirect()
    return main([folder])


def _note(folder: Path, job_id: str, code: int) -> None:
    """The line that the batch scripts of sbatch write when a start ends."""
    import time

    with (folder / "ends").open("a", encoding="utf-8") as file:
        file.write(f"{job_id} {os.environ.get('SLURM_RESTART_COUNT', 0)} {int(time.time())} {code}\n")


class Submitit:
    """A way into the queue (`backends/slurm.py`, `Door`): by submitit."""

    def script(self, folder: JobFolder, site: Site, ids: Mapping[str, str]) -> str:
        """The text that submitit gives to sbatch; needs no Slurm here."""
        from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

        names = SlurmExecutor._equivalence_dict()
        given = {
            str(names.get(key, key.removeprefix("slurm_"))): value
            for key, value in parameters(folder, site, ids).items()
        }
        place, elements = _folder(folder.path), _elements(folder.job)
        command = f"{shlex.quote(site.python)} -u -m submitit.core._submit {shlex.quote(str(place))}"
        count = elements if elements > 1 else None
        return str(_make_sbatch_string(command=command, folder=place, map_count=count, **{"wckey": None, **given}))

    def submit(self, folder: JobFolder, site: Site, ids: Mapping[str, str]) -> str:
        """Hand over a job; returns its id.

        Raises:
            Mistake: submitit is missing, the site asks for what it cannot do, or sbatch refuses the job.
        """
        executor = _executor(folder, site, ids)
        # A copy, to compare a later launch with.
        write_atomic(script_path(site.folder, folder.job.name), self.script(folder, site, ids), durable=False)
        elements = _elements(folder.job)
        stage: Callable[[int], None] = Stage(str(folder.path), elements)
        from submitit.core.utils import FailedJobError

        try:
            with _environment():
                if elements == 1:
                    return str(executor.submit(stage, 0).job_id)
                return str(executor.map_array(stage, range(elements))[0].job_id).partition("_")[0]
        except (FailedJobError, OSError) as error:
            raise Mistake(f"{folder.job.name}: sbatch refuses it: {' '.join(str(error).split())}") from error


def _executor(folder: JobFolder, site: Site, ids: Mapping[str, str]) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise Mistake("submitit is not installed here; pip install submitit, or use cluster=slurm") from error
    executor = submitit.AutoExecutor(
        folder=_folder(folder.path),
        cluster="slurm",
        slurm_max_num_timeout=folder.job.placement.segments - 1,
        slurm_python=shlex.quote(site.python),
    )
    executor.update_parameters(**parameters(folder, site, ids))
    if "wckey" not in folder.config.cluster.sbatch:  # some clusters refuse submitit's own; AutoExecutor drops None
        executor._executor.update_parameters(wckey=None)
    return executor


def _elements(job: Job) -> int:
    return 1 if job.stage in TRAINING else elements_of(job)


def _folder(job_folder: Path) -> Path:
    return job_folder / "submitit" / "%j"


def parameters(folder: JobFolder, site: Site, ids: Mapping[str, str]) -> dict[str, Any]:
    """AutoExecutor's parameters of a job.

    Raises:
        Mistake: the site asks for a container, which submitit does not start.
    """
    job, cluster = folder.job, folder.config.cluster
    if cluster.container != "none":
        raise Mistake(f"cluster.container={cluster.container}: goes with cluster.kind=slurm, not with submitit")
    place = job.placement
    options = {**options_of(job, cluster), **_dependency(job, cluster, ids), "requeue": ""}
    if place.memory:
        options["mem"] = place.memory
    own = {f"slurm_{key}": value or True for key, value in options.items() if key in OF_SUBMITIT}
    others = {key: value or True for key, value in options.items() if key not in OF_SUBMITIT}
    return {
        "name": f"{site.run}.{job.name}",
        "timeout_min": max(1, seconds(place.time) // 60),
        "nodes": place.nodes,
        "tasks_per_node": ranks_of(place) // place.nodes,
        "cpus_per_task": place.cpus_per_task,
        **{
            GPU_PARAMETERS[flag]: int(value) if value.isdecimal() else value
            for flag, value in gpu_option(place.gpus_per_node, cluster).items()
        },
        **own,
        "slurm_additional_parameters": others,
        "slurm_signal_delay_s": slurm.measured_signal(folder.path) or cluster.signal_seconds,
        "slurm_setup": _setup(folder, site),
        "slurm_srun_args": ["--wait=120", f"--cpus-per-task={place.cpus_per_task}"],
        "stderr_to_stdout": True,
    }


def _dependency(job: Job, cluster: Cluster, ids: Mapping[str, str]) -> dict[str, str]:
    words = [option.removeprefix("--").partition("=") for option in slurm.dependency(job, cluster, ids)]
    return {key: value for key, _, value in words}


_ID = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
"""Of this element, in a shell."""


def _setup(folder: JobFolder, site: Site) -> list[str]:
    """Shell lines before the ranks start."""
    job, place, scratch = shlex.quote(str(folder.path)), folder.job.placement, folder.config.cluster.scratch
    limit = seconds(place.time)
    return [
        f'export PYTHONPATH={shlex.quote(str(site.code))}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONUNBUFFERED=1',
        "export SLURM_EXPORT_ENV=ALL HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1",
        f"export OMP_NUM_THREADS={site.threads or place.cpus_per_task}",
        *[line for block in folder.config.cluster.setup for line in block.splitlines()],
        *([f'export XDL_SCRATCH={shlex.quote(scratch)}/xdl-"$SLURM_JOB_ID"'] if scratch else []),
        f'{shlex.quote(site.python)} -m xlstm_distill prepare {job} >>{job}/logs/slurm-"$SLURM_JOB_ID".log 2>&1',
        "CODE=$?",
        "case $CODE in",
        "    0) ;;",
        "    3) exit 0 ;;",
        f'    *) echo "{_ID} ${{SLURM_RESTART_COUNT:-0}} $(date +%s) $CODE" >>{job}/ends; exit $CODE ;;',
        "esac",
        f'END="$(squeue -h -j "{_ID}" -o %e 2>/dev/null | head -n 1)"',
        f'XDL_DEADLINE="$(date -d "${{END:-unknown}}" +%s 2>/dev/null)" || XDL_DEADLINE=$(($(date +%s) + {limit}))',
        'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | head -n 1)"',
        "MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 12000))",
        'export XDL_DEADLINE MASTER_ADDR="${MASTER_ADDR:-$(hostname)}" MASTER_PORT',
    ]


@contextmanager
def _environment() -> Iterator[None]:
    """Submit without what a surrounding job or the user's defaults would add."""
    before = dict(os.environ)
    clean = clean_environment()
    for key in before.keys() - clean.keys():
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(before)
