"""What stands in a job folder, compared with what is wanted now: done, to be extended, out of date, another job's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import read_yaml, write_json
from xlstm_distill.contract.job import UNFINISHED, Job, plain
from xlstm_distill.contract.manifest import Manifest, read_manifest, verify_outputs

TRAINING = ("align", "distill")
"""Stages with checkpoints and a token budget."""
MADE = (
    "checkpoints", "output", "pieces", "tensorboard", "metrics.jsonl", "ledger.jsonl", "manifest.json", "inputs.json",
)  # fmt: skip
"""What a job leaves in its folder besides logs and what it was told."""


@dataclass(frozen=True)
class State:
    """How a job folder stands."""

    kind: Literal["done", "new", "begun", "extend", "outdated"]
    """`begun`: started, no manifest; `extend`: finished on fewer tokens; `outdated`: finished, but not from these
    inputs or no longer whole."""
    reason: str = ""
    """Why it is outdated."""

    @property
    def done(self) -> bool:
        return self.kind == "done"


def state_of(path: Path, job: Job) -> State:
    """How the folder `path` stands for `job`, whose inputs are the sibling folders as they are now.

    Raises:
        Mistake: the folder holds a job of other settings, or its manifest cannot be read.
    """
    if difference := conflict(path, job):
        raise Mistake(difference)
    manifest = read_manifest(path / "manifest.json")
    if manifest is None:
        return State("begun" if begun(path) else "new")
    if manifest.inputs.keys() != set(job.inputs):
        return State("outdated", f"it was made from {', '.join(manifest.inputs) or 'nothing'}")
    for name, digest in manifest.inputs.items():
        upstream = read_manifest(path.parent / name / "manifest.json")
        if upstream is None or upstream.digest != digest:
            return State("outdated", f"{name} is not the one that it was made from")
    if wrong := verify_outputs(manifest, path / "output"):
        return State("outdated", wrong)
    return State("extend") if manifest.tokens < job.tokens else State("done")


def begun(path: Path) -> bool:
    """Whether a job has left anything that another one could mistake for its own."""
    places = (path / "checkpoints", path / "pieces", path / "output")
    return (path / "metrics.jsonl").exists() or any(place.is_dir() and any(place.iterdir()) for place in places)


def conflict(path: Path, job: Job) -> str:
    """One line about the first setting in which a started or finished folder differs from `job`; empty: none does."""
    recorded = recorded_identity(path)
    if recorded is None or covers(recorded, job.identity):
        return ""
    key = first_difference(recorded, plain(job.identity))
    there, here = (repr(side[key]) if key in side else "absent" for side in (recorded, plain(job.identity)))
    return (
        f"{job.name}: {key} is {there} in {path} and {here} now; "
        f"give the new settings a run of their own (--name NEW) or remove that folder"
    )


def recorded_identity(path: Path) -> dict[str, Any] | None:
    """Identity in a job folder's manifest, else in its `config.yaml`; None where nothing was made yet."""
    manifest = read_manifest(path / "manifest.json")
    if manifest is not None:
        return dict(manifest.identity)
    if not begun(path):
        return None
    try:
        raw = read_yaml((path / "config.yaml").read_text(encoding="utf-8"))
        return dict(raw["job"]["identity"] or {})
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise Mistake(f"{path}/config.yaml: not readable as a job; remove the folder to redo it") from error


def covers(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a folder of identity `recorded` serves `wanted`: equal, or with further data sources."""
    wanted = plain(wanted)
    extra = recorded.keys() - wanted.keys()
    return all(recorded.get(key, _ABSENT) == value for key, value in wanted.items()) and all(
        key.startswith("sources.") for key in extra
    )


_ABSENT = object()


def first_difference(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first key, in `wanted`'s order and then in `recorded`'s, whose values differ."""
    keys = [*wanted, *(key for key in recorded if key not in wanted)]
    return next(key for key in keys if recorded.get(key, _ABSENT) != wanted.get(key, _ABSENT))


def prepare(path: Path, job: Job) -> State:
    """Make a folder ready to run `job`: what was trained from other inputs is set aside, the inputs are recorded.

    Called by one process, before the ranks start, when every input is finished. `inputs.json` tells a later call what
    the checkpoints were made from; without it, a longer alignment would be followed by the old expert's checkpoints.

    Raises:
        Mistake: an input is missing, or the folder holds a job of other settings.
    """
    state = state_of(path, job)
    if state.done:
        return state
    (path / UNFINISHED).unlink(missing_ok=True)
    digests = {}
    for name in job.inputs:
        upstream = read_manifest(path.parent / name / "manifest.json")
        if upstream is None:
            raise Mistake(f"{job.name}: needs {name}, which is not finished (no {path.parent / name}/manifest.json)")
        digests[name] = upstream.digest
    record, manifest = path / "inputs.json", read_manifest(path / "manifest.json")
    other_inputs = job.stage in TRAINING and begun(path) and _started_from(record, manifest) not in (None, digests)
    damaged = job.stage == "fetch" and state.kind == "outdated"  # fetch keeps the files that it finds
    if other_inputs or damaged:
        set_aside(path)
    else:  # while the job runs, nobody may take its earlier output for the one that is asked for
        (path / "manifest.json").unlink(missing_ok=True)
    write_json(record, digests)
    return state


def _started_from(record: Path, manifest: Manifest | None) -> dict[str, str] | None:
    if manifest is not None:
        return dict(manifest.inputs)
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return None


def set_aside(path: Path) -> Path:
    """Move what a job made into `stale-N/` of its folder, out of the way of a new start; nothing is deleted."""
    number = 1
    while (aside := path / f"stale-{number}").exists():
        number += 1
    aside.mkdir(parents=True)
    for name in MADE:
        if (path / name).exists():
            (path / name).rename(aside / name)
    return aside
