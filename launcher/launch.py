"""`xdl launch`: resolve, plan, refuse what cannot run, and hand the graph to a backend."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.backends import local, slurm
from launcher.checks import STAGES, misplaced
from launcher.compose import compose
from launcher.plan import Graph, plan, states
from launcher.runs import locked, run_folder, run_name, write_run
from launcher.show import graph_text, job_text
from xlstm_distill.contract.exitcode import DONE, Mistake
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
) -> int:
    """Run or submit what is missing, and return the exit code.

    Raises:
        Mistake: the user has to mend something.
    """
    config = resolve(overrides, placing, name, dry_run)
    graph = plan(config, only=only)
    folder = run_folder(config)
    if dry_run:
        return _dry_run(graph, config, folder)
    for problem in misplaced(config):
        raise Mistake(problem)
    with locked(folder) as lock:
        standing = states(graph, folder / "jobs")
        write_run(folder, config, graph)
        if todo := [job for job in graph.names if not standing[job].done]:
            print(
                f"{folder}: {', '.join(todo)} to do, {len(graph.jobs) - len(todo)} of {len(graph.jobs)} done",
                flush=True,
            )
        else:
            print(f"{folder}: all {len(graph.jobs)} jobs are done", flush=True)
        backend = slurm if config.cluster.kind == "slurm" else local
        code = backend.run(graph, config, folder, lock, local.quoted(["xdl", *sys.argv[1:]]))
    if code == DONE and backend is slurm and follow:
        from launcher.monitor import follow_run

        return follow_run(folder, graph)
    return _summary(graph, folder) if code == DONE else code


def _dry_run(graph: Graph, config: Config, folder: Path) -> int:
    for problem in misplaced(config):
        print(f"warning: {problem}", file=sys.stderr)
    standing = states(graph, folder / "jobs")
    print(f"run {run_name(config)} in {folder} on {config.cluster.kind}\n")
    print(graph_text(graph, standing))
    for job in graph:
        if not standing[job.name].done:
            print(job_text(job, graph, config, folder, standing))
    return DONE


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
