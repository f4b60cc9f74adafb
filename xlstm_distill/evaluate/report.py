"""The `report` stage and `xdl report`: what a run measured, as Markdown, HTML, PNG and one plain table.

report.md  report.html (self-contained)  *.png  summary.txt (what the launcher prints)  win_tie.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import DONE, MISTAKE, Mistake
from xlstm_distill.contract.files import write_atomic, write_json
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.evaluate import plots, tables
from xlstm_distill.evaluate.collect import Results, checks, collect
from xlstm_distill.evaluate.pages import markdown_report, write_pages
from xlstm_distill.evaluate.scores import report_scores
from xlstm_distill.runtime.stop import StopFlag


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Write the report of the run to `output/`.

    Returns:
        Facts: critical tolerance by student, the checks that failed.
    """
    if world.rank > 0:
        return {}
    results = collect(folder.path.parents[1])
    write_report(results, folder.output)
    stars = {name: c.as_json()["critical_tolerance"] for name, c in results.comparisons().items()}
    return {"critical_tolerance": stars, "failed_checks": [what for passed, what in checks(results) if not passed]}


def write_report(results: Results, folder: Path) -> str:
    """Write all files of a run's report to `folder` and return the plain table."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    figures = plots.draw_all(results, folder)
    text = summary(results)
    write_pages(folder, results.name, markdown_report(results, figures))
    write_json(folder / "win_tie.json", {name: c.as_json() for name, c in results.comparisons().items()})
    write_atomic(folder / "summary.txt", text)
    return text


def summary(results: Results) -> str:
    """The tables and checks in at most 100 columns."""
    parts = [results.name]
    if results.sources:
        parts.append("held-out\n" + tables.as_text(tables.heldout_table(results)))
    if results.tasks:
        parts.append("tasks\n" + tables.as_text(tables.task_table(results, short=True)))
    if results.gates:
        parts.append("output gates\n" + tables.as_text(tables.gate_table(results, most=2)))
    parts.append("\n".join(f"{'ok  ' if passed else 'FAIL'} {what}" for passed, what in checks(results)))
    if results.missing:
        parts.append(f"not measured yet: {', '.join(results.missing)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def report_run(run_folder: Path, as_json: bool) -> None:
    """Print what a run has measured so far, and write its report to `RUN/report/`."""
    results = collect(run_folder)
    if as_json:
        print(
            json.dumps({name: c.as_json() for name, c in results.comparisons().items()}, indent=2, ensure_ascii=False)
        )
        return
    print(write_report(results, run_folder / "report"), end="")
    print(f"\nreport: {run_folder / 'report' / 'report.html'}")


def main(argv: list[str]) -> int:
    """`report RUN_DIR [--json]` or `report --scores FILE [--json]`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="xdl report", description="Scores, recovery and Win-and-Tie of a run.")
    parser.add_argument("run", nargs="?", type=Path, help="run folder")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="JSON: scores of a teacher and its students")
    parser.add_argument("--json", action="store_true", help="print the Win-and-Tie as JSON and write nothing")
    arguments = parser.parse_args(argv)
    try:
        if (arguments.run is None) == (arguments.scores is None):
            raise Mistake("report: give a run folder or --scores FILE, one of them")
        if arguments.scores:
            report_scores(arguments.scores, arguments.json)
        else:
            report_run(arguments.run, arguments.json)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return DONE
