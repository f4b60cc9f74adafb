"""`xdl launch`: resolve, plan, refuse what cannot run, and hand the graph to a backend."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.backends import local, slurm
from launcher.backends.queue import in_the_queue, withdraw
from launcher.caching import choices_of
from launcher.checks import STAGES, misplaced, unasked_code
from launcher.compose import compose
from launcher.estimate import Estimate, estimates, refusals
from launcher.here import lacking
from launcher.plan import Graph, all_jobs, plan, states
from launcher.restart import checked_restarts, diff_text, differences, refuse, start_over
from launcher.runs import locked, read_graph, run_folder, write_run
from launcher.scheduler import look
from launcher.show import door_of, job_text
from launcher.snapshot import record_launch
from launcher.tree import plan_json, plan_text
from xlstm_distill.contract.exitcode import DONE, MISTAKE, Mistake
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.state import TRAINING


@dataclass(frozen=True)
class Placing:
    """The flags about placement, as given."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None

    def flags(self, stage: str) -> dict[str, Any]:
        """Dotted keys of `cluster.stages`: of align and distill, or of the stage named."""
        stages = TRAINING if stage in (*TRAINING, "pipeline") else (stage,)
        given = {key: value for key, value in vars(self).items() if value is not None}
        return {f"cluster.stages.{name}.{key}": value for name in stages for key, value in given.items()}


def resolve(overrides: Sequence[str], placing: Placing, name: str, dry_run: bool) -> Config:
    """The configuration with its cluster settled: `cluster=auto` becomes slurm or local.

    Raises:
        Mistake: the configuration cannot work, or wants nodes that are not here.
    """
    stage = next((text.partition("=")[2] for text in reversed(overrides) if text.startswith("stage=")), "pipeline")
    flags = {**placing.flags(stage if stage in STAGES else "pipeline"), **({"name": name} if name else {})}
    resolved = compose(overrides, flags)
    config = resolved.config
    nodes = max((place.nodes for place in config.cluster.stages.values()), default=1)
    if config.cluster.kind == "auto":
        kind = "slurm" if slurm.answers() or (dry_run and nodes > 1) else "local"
        chosen = resolved.choices["cluster"] == "auto"
        settled = {} if chosen else {"cluster.kind": kind}
        config = compose([*overrides, *([f"cluster={kind}"] if chosen else [])], {**flags, **settled}).config
    if config.cluster.kind == "local" and nodes > 1:
        raise Mistake(
            f"--nodes {nodes}: no Slurm answers here; leave it out, or add --dry-run cluster=slurm to see the scripts"
        )
    return config


def launch(
    overrides: Sequence[str],
    placing: Placing,
    *,
    name: str = "",
    only: bool = False,
    dry_run: bool = False,
    follow: bool = False,
    restart: Sequence[str] = (),
    cancel_obsolete: bool = False,
    force: bool = False,
) -> int:
    """Run or submit what is missing, and return the exit code.

    Args:
        overrides: `key=value`.
        placing: the flags about placement.
        name: of the run.
        only: the stage without its ancestors.
        dry_run: show what would be done.
        follow: on Slurm, watch until the jobs have ended.
        restart: jobs to make anew, perhaps with other settings.
        cancel_obsolete: cancel what is in the queue and no longer wanted as it is there.
        force: even where memory, disk or tokens will not be enough, or files, GPUs or tasks are missing here.

    Raises:
        Mistake: the user has to mend something.
    """
    config = resolve(overrides, placing, name, dry_run)
    graph = plan(config, only=only)
    folder = run_folder(config)
    if dry_run:
        return _dry_run(graph, config, folder, checked_restarts(restart, graph))
    with locked(folder) as lock:
        if config.cluster.kind == "local":
            _not_beside_slurm(graph, folder)
        anew = checked_restarts(restart, graph)
        todo_stages = _to_do(graph, folder, anew)
        for problem in [*misplaced(config, todo_stages), *unasked_code(config, todo_stages)]:
            raise Mistake(problem)
        queued = submitted(folder) if config.cluster.kind != "local" else {}
        _refuse_changes(graph, folder, queued, anew)
        standing = states(graph, folder / "jobs", anew)
        if not force:
            found = estimates(graph, config, folder, standing)
            for problem in [*lacking(config, todo_stages), *refusals(found, config, folder)]:
                raise Mistake(problem)
        if anew and queued:
            withdraw(folder, list(all_jobs(config)), anew)
        for job, aside in start_over(anew, folder / "jobs").items():
            print(f"{job}: made anew; what it had made is in {aside}", flush=True)
        write_run(folder, config, graph)
        if todo := [job for job in graph.names if not standing[job].done]:
            print(
                f"{folder}: {', '.join(todo)} to do, {len(graph.jobs) - len(todo)} of {len(graph.jobs)} done",
                flush=True,
            )
        else:
            print(f"{folder}: all {len(graph.jobs)} jobs are done", flush=True)
        if on_slurm := config.cluster.kind != "local":
            door = door_of(config)
            code = slurm.run(graph, config, folder, lock, _typed(), cancel_obsolete=cancel_obsolete, door=door)
        else:
            record_launch(folder, _typed())
            code = local.run(graph, config, folder, lock, _typed())
    if code == DONE and on_slurm and follow:
        from launcher.monitor import follow_run

        return follow_run(folder, graph)
    return _summary(graph, folder) if code == DONE else code


def _refuse_changes(graph: Graph, folder: Path, queued: Iterable[str], anew: Sequence[str]) -> None:
    """Show and refuse changed settings of what was made or submitted, but for what is to be made anew."""
    found = [d for d in differences(graph, folder / "jobs", queued) if d.job not in anew]
    if found:
        print(diff_text(found), file=sys.stderr)
    refuse(found)


def _to_do(graph: Graph, folder: Path, anew: Sequence[str] = ()) -> set[str]:
    """Stages of the graph of which a job is not done, or is to be made anew."""
    made = lambda name: (folder / "jobs" / name / "manifest.json").exists() and name not in anew  # noqa: E731
    return {job.stage for job in graph if not made(job.name)}


def submitted(folder: Path) -> dict[str, str]:
    """Name → scheduler id of the run's jobs that are in a queue.

    Raises:
        Mistake: squeue does not answer.
    """
    has_ids = any(job.get("id") for job in read_graph(folder).get("jobs", {}).values())
    return in_the_queue(folder).ids if has_ids else {}


def _not_beside_slurm(graph: Graph, folder: Path) -> None:
    """Refuse to run here what may be in a queue: two would write in the same folders.

    Raises:
        Mistake: jobs are in the queue, or Slurm is here and does not say.
    """
    known = {name: job.get("id") for name, job in read_graph(folder).get("jobs", {}).items() if name in graph.names}
    ids = {name: id for name, id in known.items() if id and not (folder / "jobs" / name / "manifest.json").exists()}
    if not ids or not shutil.which("squeue"):
        return
    sight = look(ids.values())
    names = [n for n, id in ids.items() if not sight.answered or any(not task.ended for task in sight.of(id))]
    if names:
        why = "are in Slurm's queue" if sight.answered else f"were submitted to Slurm ({sight.why})"
        raise Mistake(f"{', '.join(names)} {why}; launch with cluster=slurm, or end them first: xdl cancel {folder}")


def _typed() -> str:
    """What the user typed, as it would be typed to launch."""
    return local.quoted(["xdl", *(word for word in sys.argv[1:] if word != "--dry-run")])


def show_plan(
    overrides: Sequence[str],
    placing: Placing,
    *,
    name: str = "",
    only: bool = False,
    as_json: bool = False,
    force: bool = False,
) -> int:
    """Print what a launch would take; the exit code is `MISTAKE` where something cannot fit, unless `force`."""
    config = resolve(overrides, placing, name, dry_run=True)
    graph, folder = plan(config, only=only), run_folder(config)
    found = estimates(graph, config, folder, states(graph, folder / "jobs"))
    refused = _refused(config, found, folder, _to_do(graph, folder))
    choices = choices_of(graph, config, folder)
    if as_json:
        print(json.dumps(plan_json(found, config, folder, refused, choices), indent=2, ensure_ascii=False))
    else:
        print(plan_text(graph, found, config, folder, choices), end="", flush=True)
    for problem in refused:
        print(f"{'warning' if force else 'error'}: {problem}", file=sys.stderr)
    return MISTAKE if refused and not force else DONE


def _dry_run(graph: Graph, config: Config, folder: Path, anew: Sequence[str]) -> int:
    asks = config.cluster.kind != "local" and shutil.which("squeue")
    waiting = submitted(folder) if asks else {}
    _refuse_changes(graph, folder, waiting, anew)
    standing = states(graph, folder / "jobs", anew)
    found = estimates(graph, config, folder, standing)
    print(plan_text(graph, found, config, folder, choices_of(graph, config, folder)), flush=True)
    stages = _to_do(graph, folder, anew)
    for problem in _refused(config, found, folder, stages):
        print(f"warning: {problem}", file=sys.stderr)
    ids = {name: id for name, id in waiting.items() if name not in anew}
    for job in graph:
        if job.name in ids:
            print(f"--- {job.name}: in the queue as {ids[job.name]}\n")
        elif not standing[job.name].done:
            print(job_text(job, graph, config, folder, standing, _typed(), ids))
    return DONE


def _refused(config: Config, found: list[Estimate], folder: Path, stages: Collection[str]) -> list[str]:
    """Why a launch of these stages would not start."""
    asked = [*misplaced(config, stages), *unasked_code(config, stages)]
    return [*asked, *lacking(config, stages), *refusals(found, config, folder)]


def _summary(graph: Graph, folder: Path) -> int:
    summary = folder / "jobs" / "report" / "output" / "summary.txt"
    if "report" in graph.names and summary.is_file():
        print(f"\n{summary.read_text(encoding='utf-8').rstrip()}")
    return DONE


def run_module(command: str, arguments: Sequence[str]) -> int:
    """`python -m xlstm_distill COMMAND …` as a child that has the terminal; its exit code."""
    from xlstm_distill.contract import exitcode

    package = Path(exitcode.__file__).parents[2]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    line = [sys.executable, "-m", "xlstm_distill", command, *arguments]
    try:
        return subprocess.run(line, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    except KeyboardInterrupt:
        return 130
