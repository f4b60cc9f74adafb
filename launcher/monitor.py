"""`xdl status`: how the jobs of a run stand (launcher/standing.py), as a table, as JSON, or drawn again and again."""

import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.plan import Graph
from launcher.progress import duration
from launcher.runs import find_run, read_graph
from launcher.scheduler import PATIENT_SECONDS, Sight, look
from launcher.standing import JobStatus, held, read_ends, status_of
from xlstm_distill.contract.exitcode import DONE, Mistake

EVERY = 5.0
"""Seconds between looks while a run is watched."""
HEAD = (
    "job",
    "expert",
    "id",
    "state",
    "step",
    "loss",
    "tok/s",
    "last step",
    "checkpoint",
    "restarts",
    "left",
    "goodput",
)


def run_status(folder: Path, *, sure: bool = False) -> list[JobStatus]:
    """How every job of a run stands; `sure`: from the scheduler, for who is going to act on it.

    Raises:
        Mistake: the scheduler has to be asked and does not answer.
    """
    return run_statuses([folder], sure=sure)[0]


def run_statuses(folders: Sequence[Path], *, sure: bool = False) -> list[list[JobStatus]]:
    """How the jobs of several runs stand; the scheduler is asked once about all of them."""
    graphs = [read_graph(folder).get("jobs", {}) for folder in folders]
    pending = [
        job["id"].partition("_")[0]
        for folder, jobs in zip(folders, graphs, strict=True)
        for name, job in jobs.items()
        if job.get("id") and not (folder / "jobs" / name / "manifest.json").exists()
    ]
    sight = look(pending, PATIENT_SECONDS if sure else None)
    if sure and not sight.answered:
        raise Mistake(f"the queue: {sight.why}; nothing was done, try again")
    return [_rows(folder, jobs, sight) for folder, jobs in zip(folders, graphs, strict=True)]


def _rows(folder: Path, jobs: Mapping[str, Any], sight: Sight) -> list[JobStatus]:
    here = _launch_at(folder, jobs) if held(folder / "lock") else None
    return [status_of(folder / "jobs" / name, name, job, sight, here) for name, job in jobs.items()]


def _launch_at(folder: Path, jobs: Mapping[str, Any]) -> str:
    """The job that the launch on this machine is at: the one whose folder it made ready last, if that has not ended."""
    ready = {}
    for name in (name for name, job in jobs.items() if not job.get("id")):
        config, job = folder / "jobs" / name / "config.yaml", folder / "jobs" / name
        if config.exists() and not (job / "manifest.json").exists():
            ends = read_ends(job, "local")
            ready[name] = config.stat().st_mtime if not ends or ends[-1].time < config.stat().st_mtime else 0.0
    newest = max(ready, key=lambda name: ready[name], default="")
    return newest if newest and ready[newest] else ""


def show_status(run: str, runs: str, *, as_json: bool = False, watched: bool = False) -> None:
    """Print the jobs of a run, or one line per run.

    Args:
        run: name or path; empty: all runs, or the only one.
        runs: folder of the runs.
        as_json: print `{"run", "folder", "jobs": [{"name", "stage", …}]}`, of several runs a list of these.
        watched: draw again and again until no job is alive.

    Raises:
        Mistake: there is no such run.
    """
    folders = [find_run(run, runs)] if run else [path.parent for path in sorted(Path(runs).glob("*/graph.json"))]
    if not folders:
        raise Mistake(f"{Path(runs).absolute()}: no runs; start one with xdl launch")
    if watched and as_json:
        raise Mistake("--watch and --json do not go together; leave one of them out")
    if watched:
        watch(folders)
        return
    rows = run_statuses(folders)
    if as_json:
        told = [as_record(folder, jobs) for folder, jobs in zip(folders, rows, strict=True)]
        print(json.dumps(told[0] if run else told, indent=2, ensure_ascii=False))
    else:
        print(text_of(folders, rows))


def as_record(folder: Path, rows: Sequence[JobStatus]) -> dict[str, Any]:
    """What `--json` prints of a run; unknown values are null."""
    return {"run": folder.name, "folder": str(folder.absolute()), "jobs": [asdict(row) for row in rows]}


def text_of(folders: Sequence[Path], rows: Sequence[Sequence[JobStatus]]) -> str:
    """The table of one run, or a line for each of several."""
    if len(folders) == 1:
        return f"{folders[0].absolute()}\n{table(rows[0])}"
    return "\n".join(_line(folder, jobs) for folder, jobs in zip(folders, rows, strict=True))


def _line(folder: Path, rows: Sequence[JobStatus]) -> str:
    words = [f"{sum(row.state == 'done' for row in rows)} of {len(rows)} done"]
    for state in ("running", "queued", "failed"):
        if names := [row.name for row in rows if row.state == state]:
            words.append(f"{state} {', '.join(names)}")
    return f"{folder.name}: {'; '.join(words)}"


def table(rows: Sequence[JobStatus]) -> str:
    """Rows as aligned columns, without those that are empty; below them who failed and why."""
    cells = [HEAD, *map(_cells, rows)]
    shown = [column for column in range(len(HEAD)) if any(row[column] for row in cells[1:])]
    widths = {column: max(len(row[column]) for row in cells) for column in shown}
    lines = ["  ".join(row[column].ljust(widths[column]) for column in shown).rstrip() for row in cells]
    for row in rows:
        if row.error:
            lines.append(f"{row.name}: {'' if row.rank is None else f'rank {row.rank}: '}{row.error}")
    return "\n".join(lines)


def _cells(row: JobStatus) -> tuple[str, ...]:
    ago = lambda seconds: "" if seconds is None else duration(seconds)  # noqa: E731
    number = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
    return (
        row.name,
        row.expert or "",
        row.id or "",
        f"{row.state} ({row.reason})" if row.reason else row.state,
        "" if row.step is None else f"{row.step}/{'?' if row.total is None else row.total}",
        number(row.loss, ".4g"),
        number(row.tokens_per_s, ",.0f"),
        ago(row.step_age_s),
        ago(row.checkpoint_age_s),
        str(row.restarts or ""),
        ago(row.eta_s),
        number(row.goodput, ".0%"),
    )


def watch(folders: Sequence[Path], names: Collection[str] = ()) -> list[JobStatus]:
    """Show how the jobs stand until none is alive: on a terminal drawn anew, elsewhere a line for each change.

    Args:
        folders: of the runs.
        names: of the jobs; empty: all.

    Returns:
        How they stand in the end.
    """
    look_again = lambda: [  # noqa: E731
        [row for row in rows if not names or row.name in names] for rows in run_statuses(folders)
    ]
    if not sys.stdout.isatty():
        return _until_ended(look_again, _Changes())
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        draw = lambda rows: live.update(Text(text_of(folders, rows)), refresh=True)  # noqa: E731
        return _until_ended(look_again, draw)


def _until_ended(
    look_again: Callable[[], list[list[JobStatus]]], draw: Callable[[list[list[JobStatus]]], None]
) -> list[JobStatus]:
    while True:
        rows = look_again()
        draw(rows)
        every = [row for jobs in rows for row in jobs]
        if not any(row.alive for row in every):
            return every
        time.sleep(EVERY)


class _Changes:
    """Prints what has changed since it was last called."""

    def __init__(self) -> None:
        self.shown: dict[tuple[int, str], str] = {}

    def __call__(self, rows: list[list[JobStatus]]) -> None:
        for run, jobs in enumerate(rows):
            for row in jobs:
                _, _, _, state, step, *_ = _cells(row)
                told = " ".join(filter(None, [f"{row.name}:", state, step, row.error if row.state == "failed" else ""]))
                if self.shown.get((run, row.name)) != told:
                    self.shown[run, row.name] = told
                    print(told, flush=True)


def follow_run(folder: Path, graph: Graph) -> int:
    """Watch until no job of the graph is alive; 0 when all are done, else 1."""
    return DONE if all(row.state == "done" for row in watch([folder], graph.names)) else 1
