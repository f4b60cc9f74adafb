"""Jobs on a Slurm cluster: render, submit with dependencies on the command line, remember the ids.

`fetch` needs the internet and runs here, on the login node; every other job runs offline.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

from launcher.backends import local
from launcher.backends.queue import Queue, adopt, call, cancel, script_path, until_gone, until_left
from launcher.plan import Graph, all_jobs, as_recorded, states
from launcher.reconcile import PENDING, obsolete, reconcile
from launcher.render import Site, render
from launcher.runs import record_id, run_name
from launcher.snapshot import record_launch, scrubbed_text, snapshot_folder, take_snapshot
from xlstm_distill.contract.exitcode import DONE, Mistake
from xlstm_distill.contract.files import hash_value, write_atomic
from xlstm_distill.contract.job import STOP_SECONDS, Job, JobFolder, code_version, plain
from xlstm_distill.contract.schema import Cluster, Config, Placement
from xlstm_distill.contract.state import TRAINING, State

PING_SECONDS = 2.0
SHORTEST_SIGNAL = 60
"""Seconds. Slurm looks at time limits once a minute."""
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


def site_of(config: Config, folder: Path, command: str, code: Path | None = None) -> Site:
    """What the scripts of a run need to know.

    Args:
        config: the whole configuration.
        folder: the run folder.
        command: what the user typed.
        code: the snapshot that the jobs run; None: where one of the code as it is now would be.
    """
    settings = hash_value(plain(asdict(config)))
    version = ", ".join(f"{key} {value}" for key, value in code_version().items())
    return Site(
        run_name(config),
        folder,
        sys.executable,
        code or snapshot_folder(folder),
        config.strategy.threads,
        mounts_of(config, folder),
        (f"made by: {scrubbed_text(command)}", f"{version}; settings {settings}"),
    )


def mounts_of(config: Config, folder: Path) -> tuple[str, ...]:
    """Folders that a container has to see: the run's, and those that settings name."""
    shards = "" if "://" in config.data.shards else config.data.shards
    named = [shards, config.student.init_from, config.cluster.scratch]
    named += [config.teacher.path] if config.teacher.source == "folder" else []
    teacher = folder / "jobs" / "fetch" / "output" / "teacher"
    if teacher.is_symlink():  # into the hub's cache, where snapshots/REVISION/ links to blobs/
        found = teacher.resolve()
        named.append(str(found.parents[1] if found.parent.name == "snapshots" else found))
    sources = [*config.sources.values(), *config.eval.texts.values()]
    files = [source.path for source in sources if source.kind in ("text", "jsonl", "parquet")]
    named += [str(Path(path[: _wildcard(path)]).parent) for path in files]
    return tuple(dict.fromkeys([str(folder), *filter(None, named)]))


def _wildcard(path: str) -> int:
    """Where the first wildcard of a pattern stands, or its end."""
    return min((path.index(sign) for sign in "*?[" if sign in path), default=len(path))


def dependency(job: Job, cluster: Cluster, ids: Mapping[str, str]) -> list[str]:
    """Options of sbatch that make a job wait for its inputs; inputs without an id are done.

    Merge waits for the *end* of its experts and checks their manifests itself, and so does whatever waits for time
    segments: `afterok` would count a crashed segment against an expert that its next segment finished, and a spare one
    that was cancelled too.
    """
    segmented = [stage for stage in TRAINING if cluster.stages.get(stage, Placement()).segments > 1]
    upstream = {name: ids[name] for name in job.inputs if name in ids}
    ends = [
        name
        for name in upstream
        if job.stage == "merge" or (name.partition("-")[0] in segmented and cluster.kind != "submitit")
    ]
    succeeds = [id for name, id in upstream.items() if name not in ends]
    waits = [f"afterok:{':'.join(succeeds)}"] if succeeds else []
    waits += [f"afterany:{':'.join(upstream[name] for name in ends)}"] if ends else []
    options = [f"--dependency={','.join(waits)}"] if waits else []
    return [*options, "--kill-on-invalid-dep=yes"] if succeeds else options


def submit_command(job: Job, cluster: Cluster, folder: Path, ids: Mapping[str, str]) -> list[str]:
    """The command line that submits a job."""
    return ["sbatch", "--parsable", *dependency(job, cluster, ids), str(script_path(folder, job.name))]


class Door(Protocol):
    """A way into the queue: this module, by sbatch, or `backends/submitit.py`."""

    def script(self, folder: JobFolder, site: Site, ids: Mapping[str, str]) -> str:
        """The text that sbatch gets."""

    def submit(self, folder: JobFolder, site: Site, ids: Mapping[str, str]) -> str:
        """Hand over a job, given the ids that it may have to wait for; returns its id."""


class Sbatch:
    """By sbatch itself."""

    def script(self, folder: JobFolder, site: Site, ids: Mapping[str, str]) -> str:
        """The text that sbatch gets."""
        return render(folder.job, folder.config.cluster, site, measured_signal(folder.path))

    def submit(self, folder: JobFolder, site: Site, ids: Mapping[str, str]) -> str:
        """Hand over a job; returns its id."""
        write_atomic(script_path(site.folder, folder.job.name), self.script(folder, site, ids), durable=False)
        command = submit_command(folder.job, folder.config.cluster, site.folder, ids)
        return call(command, folder.job.name).strip().partition(";")[0]


def run(
    graph: Graph, config: Config, folder: Path, lock: int, command: str, *, cancel_obsolete: bool, door: Door
) -> int:
    """Fetch here, submit the rest, and return.

    Args:
        graph: what is wanted.
        config: the whole configuration.
        folder: the run folder.
        lock: descriptor of the run's lock.
        command: what the user typed.
        cancel_obsolete: cancel what is in the queue and no longer wanted; submit anew what waits with another place.
        door: how.

    Raises:
        Mistake: the scheduler refuses a job; its answer is in the message.
    """
    if HERE in graph.names:
        code = local.run(Graph((graph[HERE],)), config, folder, lock, command)
        if code != DONE:
            return code
    snapshot = take_snapshot(folder)
    record_launch(folder, command, snapshot)
    site = site_of(config, folder, command, snapshot)
    adopt(folder, graph.names)
    queue = until_left(folder)
    queue = _without_obsolete(queue, graph, config, cancel_obsolete)
    standing = states(graph, folder / "jobs")
    otherwise = {job.name for job in graph if job.name in queue.ids and _placed_otherwise(job, config, site, door)}
    actions = reconcile(graph, standing, queue.states, otherwise, replace=cancel_obsolete)
    replaced = [name for name in reversed(graph.names) if actions[name].kind == "replace"]
    cancel(queue.ids, replaced)
    until_gone((queue.ids[name] for name in replaced), ", ".join(replaced))
    for name in (name for name, action in actions.items() if action.kind in ("submit", "replace")):
        if graph[name].stage != HERE:  # what cannot be written is refused before anything is submitted
            door.script(wanted_folder(graph[name], config, folder), site, {})
    ids = {name: id for name, id in queue.ids.items() if name not in replaced and not standing.get(name, _NEW).done}
    for name, action in actions.items():
        if graph[name].stage == HERE:
            continue
        if action.kind in ("submit", "replace"):
            ids[name] = _submit(graph[name], config, site, standing[name], ids, door)
            told = f"submitted as {ids[name]}"
        elif action.kind == "keep":
            told = "done"
        else:
            notes = _follow_up(graph[name], config, site, ids, queue.states[name], action.kind == "follow")
            if name in queue.failed:
                notes.append(f"{', '.join(queue.failed[name])} failed; launch again when the others have ended")
            told = "; ".join([f"in the queue as {ids[name]}", *notes])
        print(f"{name}: {told}{f'; {action.why}' if action.why else ''}", flush=True)
    return DONE


_NEW = State("new")


def _without_obsolete(queue: Queue, graph: Graph, config: Config, cancelled: bool) -> Queue:
    """The queue after what this configuration no longer has was cancelled, or only told."""
    gone = obsolete(queue.ids, graph, {job.name for job in all_jobs(config)})
    if gone and not cancelled:
        print(f"still in the queue, no longer wanted: {', '.join(gone)}; --cancel-obsolete cancels them", flush=True)
        return queue
    cancel(queue.ids, gone)
    return queue.without(gone)


def _placed_otherwise(job: Job, config: Config, site: Site, door: Door) -> bool:
    """Whether the script that was submitted asks sbatch for something else than one that would be made now."""
    try:
        before = script_path(site.folder, job.name).read_text(encoding="utf-8")
    except OSError:
        return False
    folder = JobFolder(site.folder / "jobs" / job.name, job, config)
    return _asked(before) != _asked(door.script(folder, site, {}))


def _asked(script: str) -> list[str]:
    """What a script asks of sbatch, but for what follows from measurements and from other jobs."""
    other = ("--signal=", "--dependency=", "--kill-on-invalid-dep")
    lines = (line for line in script.splitlines() if line.startswith("#SBATCH"))
    return [line for line in lines if not any(option in line for option in other)]


def _follow_up(
    job: Job, config: Config, site: Site, ids: Mapping[str, str], state: str, inputs_are_new: bool
) -> list[str]:
    """Tell a job that waits what has changed: settings that may, as a token budget, and whom to wait for. Returns what
    could not be told."""
    path, notes = site.folder / "jobs" / job.name, []
    there = _told(path)
    if state == PENDING and as_recorded(job, path) == job and _runs_this_code(job, site):
        place = there.placement if there else job.placement  # it runs where it was submitted to
        JobFolder(path, replace(job, placement=place), config).write()
    elif there and there.tokens < job.tokens:
        notes = [f"with a budget of {there.tokens} tokens; launch again when it has ended, for {job.tokens}"]
    if inputs_are_new:
        wait = dependency(job, config.cluster, ids)[0].removeprefix("--")
        call(["scontrol", "update", f"JobId={ids[job.name]}", wait.replace("dependency", "Dependency", 1)], job.name)
    return notes


def _told(path: Path) -> Job | None:
    """The job as its folder describes it; None: nothing, or what another version of this code wrote."""
    try:
        return JobFolder.read(path).job
    except Mistake:
        return None


def _runs_this_code(job: Job, site: Site) -> bool:
    """Whether a job of the queue has the snapshot of this launch, and can read the settings that this launch writes."""
    try:
        return str(site.code) in script_path(site.folder, job.name).read_text(encoding="utf-8")
    except OSError:
        return False


def ready(job: Job, config: Config, run: Path) -> JobFolder:
    """The job's folder below the run's, written and cleared of what an earlier start left to be told."""
    folder = wanted_folder(job, config, run)
    folder.write()
    folder.logs.mkdir(exist_ok=True)
    for left in (folder.stop_file, *folder.path.glob("crashes*"), *folder.path.glob("begun*")):
        left.unlink(missing_ok=True)
    return folder


def wanted_folder(job: Job, config: Config, run: Path) -> JobFolder:
    """The folder of a job with what it is to be told; nothing is written."""
    path = run / "jobs" / job.name
    recorded = as_recorded(job, path)
    return JobFolder(path, recorded, config if recorded == job else JobFolder.read(path).config)


def _submit(job: Job, config: Config, site: Site, state: State, ids: Mapping[str, str], door: Door) -> str:
    folder = ready(job, config, site.folder)
    id = door.submit(folder, site, ids)
    record_id(site.folder, job.name, id)
    if state.kind == "extend" or (state.kind == "outdated" and job.stage not in TRAINING):
        folder.manifest_path.unlink(missing_ok=True)  # merge waits for the job's end, however it ends
    return id


def measured_signal(job_folder: Path) -> int:
    """Seconds before the time limit at which USR2 has to come, from what a stop of this job was measured to take; 0:
    not measured."""
    try:
        told = json.loads((job_folder / STOP_SECONDS).read_text(encoding="utf-8"))
        return max(SHORTEST_SIGNAL, math.ceil(told["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return 0
