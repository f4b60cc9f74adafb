"""Jobs on a Slurm cluster: render, submit with dependencies on the command line, remember the ids.

`fetch` needs the internet and runs here, on the login node; every other job runs offline.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from launcher.backends import local
from launcher.plan import Graph, as_recorded, states
from launcher.render import Site, render
from launcher.runs import read_graph, record_id, run_name
from launcher.snapshot import snapshot_folder, take_snapshot
from xlstm_distill.contract.exitcode import DONE, Mistake
from xlstm_distill.contract.files import write_atomic
from xlstm_distill.contract.job import Job, JobFolder
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.state import TRAINING, State

PING_SECONDS = 2.0
HERE = "fetch"
"""The stage that runs on the login node."""


def answers() -> bool:
    """Whether this machine can submit: `sbatch` stands on the PATH and `scontrol ping` answers in time."""
    if not (shutil.which("sbatch") and shutil.which("scontrol")):
        return False
    try:
        ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=PING_SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return False
    return ping.returncode == 0 and " UP" in ping.stdout.upper()


def site_of(config: Config, folder: Path) -> Site:
    """What the scripts of a run need to know."""
    return Site(run_name(config), folder, sys.executable, snapshot_folder(folder), config.strategy.threads)


def dependency(job: Job, ids: Mapping[str, str]) -> list[str]:
    """Options of sbatch that make a job wait for its inputs; inputs without an id are done.

    Merge waits for the *end* of its experts and checks their manifests itself: `afterok` would count a crashed segment
    against an expert that its next segment finished.
    """
    upstream = [ids[name] for name in job.inputs if name in ids]
    if not upstream:
        return []
    kind = "afterany" if job.stage == "merge" else "afterok"
    waits = [f"--dependency={kind}:{':'.join(upstream)}"]
    return waits if kind == "afterany" else [*waits, "--kill-on-invalid-dep=yes"]


def script_path(folder: Path, job: Job) -> Path:
    """Where a job's script is written."""
    return folder / "jobs" / job.name / "submit.sbatch"


def submit_command(job: Job, folder: Path, ids: Mapping[str, str]) -> list[str]:
    """The command line that submits a job."""
    return ["sbatch", "--parsable", *dependency(job, ids), str(script_path(folder, job))]


def run(graph: Graph, config: Config, folder: Path, lock: int, command: str) -> int:
    """Fetch here, submit the rest, and return.

    Raises:
        Mistake: sbatch refuses a job; its answer is in the message.
    """
    if HERE in graph.names:
        code = local.run(Graph((graph[HERE],)), config, folder, lock, command)
        if code != DONE:
            return code
    found = states(graph, folder / "jobs")
    known = {name: job["id"] for name, job in read_graph(folder).get("jobs", {}).items() if job.get("id")}
    alive = queued(known.values())
    ids = {name: known[name] for name in graph.names if known.get(name) in alive and not found[name].done}
    site = site_of(config, folder)
    take_snapshot(folder)
    for job in graph:
        if found[job.name].done or job.name in ids or job.stage == HERE:
            print(
                f"{job.name}: {'done' if found[job.name].done else f'in the queue as {ids.get(job.name)}'}", flush=True
            )
            continue
        ids[job.name] = _submit(job, config, site, ids, found[job.name])
        record_id(folder, job.name, ids[job.name])
        print(f"{job.name}: submitted as {ids[job.name]}", flush=True)
    return DONE


def _submit(job: Job, config: Config, site: Site, ids: Mapping[str, str], state: State) -> str:
    path = site.folder / "jobs" / job.name
    recorded = as_recorded(job, path)
    folder = JobFolder(path, recorded, config if recorded == job else JobFolder.read(path).config)
    if state.kind == "extend" or (state.kind == "outdated" and job.stage not in TRAINING):
        (path / "manifest.json").unlink(missing_ok=True)  # merge waits for the job's end, however it ends
    folder.write()
    folder.logs.mkdir(exist_ok=True)
    folder.stop_file.unlink(missing_ok=True)
    write_atomic(script_path(site.folder, job), render(recorded, config.cluster, site))
    answer = subprocess.run(submit_command(job, site.folder, ids), capture_output=True, text=True, check=False)
    if answer.returncode:
        raise Mistake(f"{job.name}: sbatch refuses it: {' '.join(answer.stderr.split())}")
    return answer.stdout.strip().partition(";")[0]


def queued(ids: Iterable[str]) -> set[str]:
    """Which of these scheduler ids are still pending or running."""
    wanted = set(ids)
    if not wanted:
        return set()
    listing = subprocess.run(["squeue", "-h", "--me", "-o", "%F"], capture_output=True, text=True, check=False)
    if listing.returncode:
        raise Mistake(f"squeue does not answer ({' '.join(listing.stderr.split())}); launch again when it does")
    return wanted & set(listing.stdout.split())
