"""What a launch looks for on this machine, so that nothing is missed hours later: files, GPUs, names of tasks."""

import os
import shutil
import subprocess
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from xlstm_distill.contract.data import data_folder
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import read_yaml
from xlstm_distill.contract.schema import Config, Placement, Source
from xlstm_distill.contract.tasks import PREFIX

LOCAL = ("jsonl", "parquet", "text")
"""Kinds of sources that are files."""


def lacking(config: Config, stages: Collection[str]) -> list[str]:
    """One line per thing that jobs of these stages will need and that is not here."""
    missing = [*_files(config, stages), *_gpus(config, stages), *_tasks(config, stages)]
    return [f"{line}, or --force" for line in missing]


def _files(config: Config, stages: Collection[str]) -> Iterator[str]:
    folders = {"student.init_from": config.student.init_from, "data.shards": config.data.shards}
    if config.teacher.source == "folder" and "fetch" in stages:
        folders["teacher.path"] = config.teacher.path
    for key, path in folders.items():
        if path and "://" not in path and not os.path.isdir(os.path.expanduser(path)):
            yield f"{key}={path}: no such folder; give another"
    if config.data.shards or not {"fetch", "tokenize"} & set(stages):
        return
    for name, source in config.sources.items():
        if source.kind in LOCAL:
            yield from _no_files(name, source)


def _no_files(name: str, source: Source) -> Iterator[str]:
    from xlstm_distill.data.sources import local_files

    try:
        local_files(name, source)
    except Mistake as error:
        yield str(error)


def _gpus(config: Config, stages: Collection[str]) -> Iterator[str]:
    if config.cluster.kind != "local" or shutil.which("rocm-smi"):
        return
    wanted = {stage: config.cluster.stages.get(stage, Placement()).gpus_per_node for stage in sorted(stages)}
    most = max(wanted.values(), default=0)
    if most and (count := _count_gpus()) < most:
        named = ", ".join(stage for stage, gpus in wanted.items() if gpus > count)
        yield (
            f"{named}: up to {most} GPUs, and this machine has {count}; give --gpus-per-node {count} "
            f"(cluster.stages.STAGE.gpus_per_node), or another cluster"
        )


def _count_gpus() -> int:
    """GPUs that the driver lists: importing torch would take seconds."""
    if not shutil.which("nvidia-smi"):
        return 0
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())


def _tasks(config: Config, stages: Collection[str]) -> Iterator[str]:
    """Where lm-eval is installed. Tasks of the shipped suites are known to be there, and reading its folder takes a
    second."""
    asked = [(stage, task) for stage in ("merge", "eval") if stage in stages for task in getattr(config, stage).tasks]
    asked = [(stage, task) for stage, task in asked if not task.startswith(PREFIX) and task not in _shipped()]
    if not asked:
        return
    from xlstm_distill.evaluate.suites import names

    known = names()
    for stage, task in asked:
        if known and task not in known:
            nearest = get_close_matches(task, known, n=1, cutoff=0.0)[0]
            yield f"{stage}.tasks: {task}: no task of the installed lm-eval; the nearest is {nearest}"


@cache
def _shipped() -> frozenset[str]:
    """Tasks of the shipped suites."""
    files = Path(data_folder("configs"), "eval").glob("*.yaml")
    return frozenset(task for file in files for task in read_yaml(file.read_text(encoding="utf-8")).get("tasks", ()))
