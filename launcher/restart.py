"""Jobs of a run whose settings have changed: what differs, and setting aside what they made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.plan import Graph
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import read_yaml
from xlstm_distill.contract.job import plain
from xlstm_distill.contract.state import begun, covers, recorded_identity, set_aside

ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """A setting that a job was started with and that is another now."""

    job: str
    key: str
    there: Any
    here: Any


def differences(graph: Graph, jobs_folder: Path, queued: Iterable[str] = ()) -> list[Difference]:
    """Every setting in which what a job made, or was submitted to make, differs from what is wanted now.

    Args:
        graph: what is wanted.
        jobs_folder: `runs/NAME/jobs`.
        queued: jobs that wait in a queue or run: their folder counts though they have made nothing yet.
    """
    waiting = set(queued)
    found = []
    for job in graph:
        recorded = recorded_identity(jobs_folder / job.name)
        if recorded is None and job.name in waiting:
            recorded = _submitted(jobs_folder / job.name)
        if recorded is None or covers(recorded, job.identity):
            continue
        wanted = plain(job.identity)
        keys = [key for key in {**recorded, **wanted} if recorded.get(key, ABSENT) != wanted.get(key, ABSENT)]
        found += [Difference(job.name, key, recorded.get(key, ABSENT), wanted.get(key, ABSENT)) for key in keys]
    return found


def _submitted(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(read_yaml((folder / "config.yaml").read_text(encoding="utf-8"))["job"]["identity"] or {})
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def diff_text(found: Sequence[Difference]) -> str:
    """The differences as lines of `- key: there` and `+ key: here` under each job's name."""
    lines: list[str] = []
    for difference in found:
        if f"{difference.job}:" not in lines:
            lines.append(f"{difference.job}:")
        lines += [f"  - {difference.key}: {difference.there}", f"  + {difference.key}: {difference.here}"]
    return "\n".join(lines)


def refuse(found: Sequence[Difference]) -> None:
    """Raise where anything differs.

    Raises:
        Mistake: with the ways out.
    """
    if not found:
        return
    jobs = list(dict.fromkeys(difference.job for difference in found))
    first = found[0]
    raise Mistake(
        f"{first.job}: {first.key} is {first.there!r} in this run and {first.here!r} now"
        f"{f' ({len(found)} settings differ)' if len(found) > 1 else ''}; give the new settings a run of their own "
        f"(--name NEW) or make anew what they change ({' '.join(f'--restart {job}' for job in jobs)})"
    )


def checked_restarts(wanted: Sequence[str], graph: Graph) -> list[str]:
    """The jobs named with `--restart`.

    Raises:
        Mistake: one is not in the graph.
    """
    for name in wanted:
        if name not in graph.names:
            raise Mistake(f"--restart {name}: no such job here; there are {', '.join(graph.names)}")
    return list(dict.fromkeys(wanted))


def start_over(jobs: Iterable[str], jobs_folder: Path) -> Mapping[str, Path]:
    """Set aside what these jobs made; name → folder that holds it now."""
    return {
        name: set_aside(jobs_folder / name)
        for name in jobs
        if begun(jobs_folder / name) or (jobs_folder / name / "manifest.json").exists()
    }
