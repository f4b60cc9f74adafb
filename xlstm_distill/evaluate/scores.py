"""`xdl report --scores FILE`: Win-and-Tie of any scores, from any harness."""

import json
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.evaluate import plots, tables
from xlstm_distill.evaluate.pages import missing_scores, write_pages
from xlstm_distill.evaluate.win_tie import Comparison, compare

SHAPE = 'expected {"teacher": {task: score}, "students": {name: {task: score}}}'
REQUIRED = {"teacher", "students"}


def read_scores(path: Path) -> tuple[dict[str, Any], dict[str, Comparison]]:
    """The teacher's scores and each student's comparison, from a file of `SHAPE`.

    An optional `"lower_is_better": [task, …]` beside names tasks that stay out.

    Raises:
        Mistake: the file is missing or says something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(f"--scores {path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise Mistake(f"--scores {path}: not JSON ({error})") from error
    if not isinstance(raw, dict) or not {"teacher", "students"} <= set(raw) <= {
        "teacher",
        "students",
        "lower_is_better",
    }:
        raise Mistake(f"--scores {path}: {SHAPE}")
    teacher, students, lower = raw["teacher"], raw["students"], raw.get("lower_is_better", [])
    tables_fit = isinstance(students, dict) and all(isinstance(table, dict) for table in [teacher, *students.values()])
    if not tables_fit or not isinstance(lower, list):
        raise Mistake(f"--scores {path}: {SHAPE}")
    if not students:
        raise Mistake(f"--scores {path}: students: none given; {SHAPE}")
    try:
        return teacher, {name: compare(teacher, scores, lower, name) for name, scores in students.items()}
    except Mistake as error:
        raise Mistake(f"--scores {path}: {error}") from error


def report_scores(path: Path, as_json: bool) -> None:
    """Print the Win-and-Tie of any scores: as JSON, or as a table with a report in the folder `STEM-report` beside."""
    teacher, comparisons = read_scores(path)
    if as_json:
        print(json.dumps({name: c.as_json() for name, c in comparisons.items()}, indent=2, ensure_ascii=False))
        return
    folder = path.with_name(f"{path.stem}-report")
    folder.mkdir(exist_ok=True)
    plots.save(lambda: plots.win_tie(comparisons), folder / "win_tie.png")
    table = tables.scores_table(teacher, comparisons)
    figure = f"![{plots.FIGURES['win_tie']}](win_tie.png)"
    notes = ["Recovery: student / teacher. C_α: share of the tasks won or tied at α.", *missing_scores(comparisons)]
    write_pages(folder, path.stem, "\n\n".join([f"# {path.stem}", *notes, tables.as_markdown(table), figure]) + "\n")
    print("\n\n".join([tables.as_text(table), *missing_scores(comparisons), f"report: {folder / 'report.html'}"]))
