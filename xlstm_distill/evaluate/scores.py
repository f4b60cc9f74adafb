"""Tables of scores from any harness, or of a paper: JSON or CSV → a board (format: docs/report.md)."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.evaluate.board import Board, Score, Student, samples_of
from xlstm_distill.evaluate.domains import by_name
from xlstm_distill.evaluate.verdict import TEACHER

SHAPE = 'expected {"teacher": {task: score}, "students": {name: {task: score}}}'
ROW = 'expected {"task": …, "model": …, "score": …}'
REQUIRED = {"task", "model", "score"}
OPTIONAL = {"stderr", "samples", "domain", "higher_is_better"}
KEYS = {"teacher", "students", "lower_is_better"}
GENERALIST = "generalist"


def read_board(path: Path) -> Board:
    """The board of a file: CSV where its name says so, else JSON.

    Raises:
        Mistake: the file is missing or says something else.
    """
    try:
        board = _read(path.suffix.lower() == ".csv", path.read_text(encoding="utf-8-sig"))
        board.check()
        return board
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"--scores {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except ValueError as error:
        raise Mistake(f"--scores {path}: not JSON ({error})") from error
    except Mistake as error:
        raise Mistake(f"--scores {path}: {error}") from error


def _read(as_csv: bool, text: str) -> Board:
    if as_csv:
        return _of_rows(_csv_rows(text))
    raw = json.loads(text)
    return _of_rows(list(enumerate(raw, 1))) if isinstance(raw, list) else _of_tables(raw)


def _of_tables(raw: Any) -> Board:
    if not isinstance(raw, Mapping) or not {"teacher", "students"} <= set(raw) <= KEYS:
        raise Mistake(SHAPE)
    teacher, students, lower = raw["teacher"], raw["students"], raw.get("lower_is_better", [])
    tables_fit = isinstance(students, dict) and all(isinstance(table, dict) for table in [teacher, *students.values()])
    if not tables_fit or not isinstance(lower, list):
        raise Mistake(SHAPE)
    models = {TEACHER: teacher, **students}
    scores = {name: {task: Score(value) for task, value in table.items()} for name, table in models.items()}
    return _board(scores, frozenset(map(str, lower)), {})


def _csv_rows(text: str) -> list[tuple[int, Any]]:
    """(line, row) of each row, empty cells left out."""
    reader = csv.DictReader(text.splitlines())
    if missing := sorted(REQUIRED - set(reader.fieldnames or ())):
        raise Mistake(
            f"line 1: no column {missing[0]}; expected task,model,score and perhaps {','.join(sorted(OPTIONAL))}"
        )
    return [(reader.line_num, {key: value for key, value in row.items() if value}) for row in reader]


def _of_rows(rows: list[tuple[int, Any]]) -> Board:
    scores: dict[str, dict[str, Score]] = {TEACHER: {}}
    lower: set[str] = set()
    domains: dict[str, str] = {}
    for number, row in rows:
        if not isinstance(row, Mapping) or not {"task", "model"} <= set(row):
            raise Mistake(f"row {number}: {ROW}")
        if unknown := sorted(set(map(str, row)) - REQUIRED - OPTIONAL):
            raise Mistake(f"row {number}: {unknown[0]}: not known; there are {', '.join(sorted(REQUIRED | OPTIONAL))}")
        task, table = str(row["task"]), scores.setdefault(str(row["model"]), {})
        if task in table:
            raise Mistake(f"row {number}: {row['model']} has a score on {task} already")
        table[task] = _score(number, row)
        if str(row.get("higher_is_better", "true")).lower() in ("false", "0", "no"):
            lower.add(task)
        if row.get("domain"):
            domains[task] = str(row["domain"])
    return _board(scores, frozenset(lower), domains)


def _score(number: int, row: Mapping[str, Any]) -> Score:
    value, stderr = (_number(number, row, key) for key in ("score", "stderr"))
    found = row.get("samples")
    if isinstance(found, Mapping):
        items = samples_of({"id": id, "score": score} for id, score in found.items())
        if not items or value is None or not math.isclose(math.fsum(items.values()) / len(items), value, abs_tol=1e-6):
            raise Mistake(f"row {number}: samples: expected {{id: score}} whose mean is the score")
        return Score(value, stderr, items)
    count = _number(number, row, "samples")
    if stderr is None and count and value is not None and 0 <= value <= 1:
        stderr = math.sqrt(value * (1 - value) / count)  # of a share of `count` items
    return Score(value, stderr)


def _number(number: int, row: Mapping[str, Any], key: str) -> float | None:
    """A finite cell, or None where it is empty or NaN."""
    value = row.get(key)
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise Mistake(f"row {number}: {key}={value!r}: expected a number") from error
    return found if math.isfinite(found) else None


def _board(scores: Mapping[str, Mapping[str, Score]], lower: frozenset[str], domains: Mapping[str, str]) -> Board:
    """Students named like a domain count as its experts; one named generalist is one."""
    teacher = scores[TEACHER]
    students = tuple(Student(name, table, teacher) for name, table in scores.items() if name != TEACHER)
    if not students:
        raise Mistake("students: none given; name at least one model beside teacher")
    domain = {task: domains.get(task) or by_name(task) for task in teacher}
    names = [student.name for student in students]
    experts = tuple(name for name in names if name in domain.values())
    return Board(teacher, students, lower, domain, experts, tuple(name for name in names if name == GENERALIST))
