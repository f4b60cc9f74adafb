"""The `report` stage and `xdl report`: what a run measured, as Markdown, HTML, PNG and one plain table.

report.md  report.html (self-contained)  *.png  summary.txt (what the launcher prints)  win_tie.json (docs/report.md)
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import DONE, MISTAKE, Mistake
from xlstm_distill.contract.files import write_atomic, write_json
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.evaluate import plots, tables, verdict_tables
from xlstm_distill.evaluate.checks import checks
from xlstm_distill.evaluate.collect import Results, beside, collect
from xlstm_distill.evaluate.pages import figure_parts, markdown_report, standing, verdict_parts, write_pages
from xlstm_distill.evaluate.scores import read_board
from xlstm_distill.evaluate.verdict import Verdicts
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
    verdicts = verdicts_of(results)
    figures = plots.draw_all(results, verdicts, folder)
    text = summary(results, verdicts)
    write_pages(folder, results.name, markdown_report(results, verdicts, figures))
    write_json(folder / "win_tie.json", verdict_tables.verdicts_json(verdicts) if verdicts else {})
    write_atomic(folder / "summary.txt", text)
    return text


def verdicts_of(results: Results) -> Verdicts | None:
    """The verdict on a run's students; None without scores of a teacher and a student."""
    board = results.board
    return Verdicts(board) if board and board.students else None


def summary(results: Results, verdicts: Verdicts | None) -> str:
    """The tables and checks in at most 100 columns."""
    parts = [results.name]
    if results.sources:
        parts.append("held-out\n" + tables.as_text(tables.heldout_table(results)))
    if results.tasks:
        parts.append("tasks\n" + tables.as_text(tables.task_table(results, short=True)))
    if verdicts:
        parts += verdict_summary(verdicts)
    if results.gates:
        parts.append("output gates\n" + tables.as_text(tables.gate_table(results, most=2)))
    parts.append("\n".join(f"{'ok  ' if passed else 'FAIL'} {what}" for passed, what in checks(results)))
    parts.append("\n".join(line[0].lower() + line[1:] for line in standing(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict_summary(verdicts: Verdicts) -> list[str]:
    """The verdict's tables for a terminal, but for the one by task."""
    parts = ["verdict\n" + tables.as_text(verdict_tables.verdict_table(verdicts, short=True))]
    if len(verdicts.board.domains) > 1:
        parts.append("recovery by domain\n" + tables.as_text(verdict_tables.domain_table(verdicts, short=True)))
    if verdicts.changes:
        parts.append("what merging changed\n" + tables.as_text(verdict_tables.change_table(verdicts, short=True)))
    lines = (textwrap.fill(line, tables.WIDTH, subsequent_indent="  ") for line in verdict_tables.notes(verdicts))
    return [*parts, "\n".join(lines)]


def report_run(run_folder: Path, others: Sequence[str], as_json: bool) -> None:
    """Print what a run has measured so far, and write its report to `RUN/report/`.

    Args:
        run_folder: of the run.
        others: students of other runs, each `RUN_DIR:MODEL` (empty: merged).
        as_json: print the verdict as JSON and write nothing.
    """
    places = [text.rpartition(":") for text in dict.fromkeys(others)]
    students = tuple(beside(Path(run), model, run_folder) for run, _, model in places)
    results = replace(collect(run_folder), others=students)
    if as_json:
        _print_json(verdicts_of(results))
        return
    print(write_report(results, run_folder / "report"), end="")
    print(f"\nreport: {run_folder / 'report' / 'report.html'}")


def report_scores(path: Path, as_json: bool) -> None:
    """Print the verdict on any scores: as JSON, or as tables with a report in the folder `STEM-report` beside."""
    verdicts = Verdicts(read_board(path))
    if as_json:
        _print_json(verdicts)
        return
    folder = path.with_name(f"{path.stem}-report")
    folder.mkdir(exist_ok=True)
    drawn = plots.draw_verdicts(verdicts, folder)
    figures = figure_parts(name for name in plots.FIGURES if name in drawn)
    write_pages(folder, path.stem, "\n\n".join([f"# {path.stem}", *verdict_parts(verdicts), *figures]) + "\n")
    by_task = "recovery by task\n" + tables.as_text(verdict_tables.recovery_table(verdicts, short=True))
    parts = [*verdict_summary(verdicts), by_task, f"report: {folder / 'report.html'}"]
    print("\n\n".join(part for part in parts if part))


def _print_json(verdicts: Verdicts | None) -> None:
    found = verdict_tables.verdicts_json(verdicts) if verdicts else {}
    print(json.dumps(found, indent=2, ensure_ascii=False))


def main(argv: list[str]) -> int:
    """`report RUN_DIR [--beside RUN_DIR:MODEL]… [--json]` or `report --scores FILE [--json]`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="xdl report", description="Scores, recovery and Win-and-Tie of a run.")
    parser.add_argument("run", nargs="?", type=Path, help="run folder")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="JSON or CSV: scores of a teacher and its students")
    parser.add_argument("--beside", action="append", default=[], metavar="RUN_DIR:MODEL", help="another run's student")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON and write nothing")
    arguments = parser.parse_args(argv)
    try:
        if (arguments.run is None) == (arguments.scores is None):
            raise Mistake("report: give a run folder or --scores FILE, one of them")
        if arguments.scores and arguments.beside:
            raise Mistake("report: --beside goes with a run; a file of --scores holds all its students")
        if arguments.scores:
            report_scores(arguments.scores, arguments.json)
        else:
            report_run(arguments.run, arguments.beside, arguments.json)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return DONE
