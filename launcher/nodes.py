"""`xdl doctor --nodes N`: a short job on N nodes, one rank per GPU (xlstm_distill/runtime/checkup.py), whose reports
are compared (launcher/findings.py); nodes that are slow, broken or differ are named.

RUNS/.doctor/TIME/jobs/check/  submit.sbatch  nodes  logs/  reports/rank-R.json
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.backends import slurm
from launcher.backends.local import quoted
from launcher.backends.queue import clean_environment
from launcher.checks import ranks_of
from launcher.findings import compare
from launcher.launch import Placing, resolve
from launcher.logs import last_error, rank_logs, tail
from launcher.render import render
from launcher.scheduler import look
from launcher.snapshot import package_folder, take_snapshot
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_atomic
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.schema import Config, Placement

LIMIT = "00:10:00"
"""Time limit of the job."""
SILENT_SECONDS = 120.0
"""Without an answer of Slurm's, after which the check is given up."""
POLL = 1.0
"""Seconds between looks at it."""


def check_nodes(nodes: int, gpus_per_node: int | None, overrides: Sequence[str], runs: str) -> int:
    """Run the job, print what it found, and return 0 when all is well, else 1.

    Args:
        nodes: how many.
        gpus_per_node: ranks per node; None: those of stage distill.
        overrides: `key=value` for the cluster (`cluster=SITE`).
        runs: folder of the runs, which all nodes have to see.

    Raises:
        Mistake: settings that cannot work, or the scheduler refuses the job.
    """
    config = resolve(overrides, Placing(nodes, gpus_per_node), "", False)
    place = replace(config.cluster.stages.get("distill", Placement()), time=LIMIT, segments=1)
    folder = Path(runs).expanduser().absolute() / ".doctor" / time.strftime("%Y%m%d-%H%M%S") / "jobs" / "check"
    (folder / "logs").mkdir(parents=True)
    print(f"nodes × ranks: {place.nodes} × {ranks_of(place) // place.nodes}", flush=True)
    run = _run_here if config.cluster.kind == "local" else _run_on_slurm
    ended = run(config, replace(Job("check", "check", {}), placement=place), folder)
    found = compare(read_reports(folder), ranks_of(place), _names(folder, place))
    print("\n".join(found.lines))
    for node, fault in found.faults.items():
        print(f"{node}: {fault}")
    if (bad := [node for node in found.faults if not node.startswith("rank ")]) and config.cluster.kind != "local":
        known = [before] if (before := config.cluster.sbatch.get("exclude", "")) else []
        print(f"leave out what is slow or broken: cluster.sbatch.exclude={','.join([*known, *bad])}")
    if not found.fine:
        print(_last_words(folder, ended))
    if found.fine and not found.faults:
        shutil.rmtree(folder.parents[1])
        return 0
    print(f"reports: {folder}/reports")
    return 1


def _run_on_slurm(config: Config, job: Job, folder: Path) -> str:
    """Submit the job and wait for its end; how Slurm says it ended. Ctrl-C cancels it."""
    run = folder.parents[1]
    site = slurm.site_of(config, run, quoted(["xdl", *sys.argv[1:]]), take_snapshot(run))
    site = replace(site, run="doctor")
    script = folder / "submit.sbatch"
    write_atomic(script, render(job, config.cluster, site, template="check.sbatch.j2"))
    command = ["sbatch", "--parsable", str(script)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    if answer.returncode:
        raise Mistake(f"sbatch refuses the check: {' '.join(answer.stderr.split())}")
    id = answer.stdout.strip().partition(";")[0]
    try:
        return _wait(id, folder, ranks_of(job.placement))
    except BaseException:
        subprocess.run(["scancel", id], check=False)
        print(f"cancelled job {id}", file=sys.stderr)
        raise


def _wait(id: str, folder: Path, ranks: int) -> str:
    shown, seen, answered = "", False, time.monotonic()
    while True:
        sight = look([id])
        answered = time.monotonic() if sight.answered else answered
        if time.monotonic() - answered > SILENT_SECONDS:
            raise Mistake(f"job {id}: {sight.why}; look at it when Slurm answers again")
        tasks = sight.of(id)
        seen = seen or bool(tasks)
        if tasks and tasks[0].ended:
            return tasks[0].state
        if seen and sight.answered and not tasks:
            return "no longer known to Slurm"
        state = tasks[0] if tasks else None
        told = f"job {id}: {state.state.lower() if state else 'submitted'}"
        told += f" ({state.reason})" if state and state.waits and state.reason else ""
        told += f", {len(read_reports(folder))} of {ranks} ranks have begun" if state and not state.waits else ""
        if told != shown:
            print(told, flush=True)
            shown = told
        time.sleep(POLL)


def _free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to whoever connects meanwhile."""
    while True:
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", random.randrange(15_000, 30_000)))
            return int(free.getsockname()[1])


def _run_here(config: Config, job: Job, folder: Path) -> str:
    """Run the ranks on this machine; their exit codes in words."""
    ranks = ranks_of(job.placement)
    port = _free_port()
    threads = config.strategy.threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    paths = os.pathsep.join([str(package_folder().parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {**os.environ, "PYTHONPATH": paths, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": str(threads)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    try:
        for rank in range(ranks):
            with (folder / "logs" / f"rank-{rank}.log").open("wb") as log:
                command = [sys.executable, "-m", "xlstm_distill", "checkup", str(folder)]
                variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=variables))
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    return f"exit codes {', '.join(map(str, codes))}"


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The ranks' reports so far, by rank."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "reports").glob("rank-*.json")]
    return sorted(found, key=lambda report: report["rank"])


def _names(folder: Path, place: Placement) -> list[str]:
    """The node of each rank, where the batch script wrote the nodes down."""
    try:
        nodes = (folder / "nodes").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [node for node in nodes for _ in range(ranks_of(place) // place.nodes)]


def _last_words(folder: Path, ended: str) -> str:
    errors = [(path, said) for path in rank_logs(folder) if (said := last_error(tail(path)))]
    batch = [(path, text) for path in (folder / "logs").glob("slurm-*.log") if (text := tail(path).strip())]
    told = [f"{path.name}: {said}" for path, said in errors[:3]]
    told += [f"{path.name}: {text.splitlines()[-1]}" for path, text in batch]
    return "\n".join([f"the check ended early ({ended}); its logs: {folder}/logs", *told])
