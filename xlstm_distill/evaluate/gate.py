"""`xdl gate`: whether a student is good enough, as an exit code, and which task decided.

Exit code 0: every condition holds; 1: one does not; 2: there is nothing to judge (no such run, task, student or score).
"""

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from xlstm_distill.contract.exitcode import DONE, MISTAKE, Mistake
from xlstm_distill.evaluate.board import Board
from xlstm_distill.evaluate.collect import collect
from xlstm_distill.evaluate.scores import read_board
from xlstm_distill.evaluate.tables import number
from xlstm_distill.evaluate.verdict import MERGED
from xlstm_distill.evaluate.win_tie import SLACK, Comparison

REFUSED = 1
"""Exit code of a condition that does not hold."""


@dataclass(frozen=True)
class Judgement:
    """One condition, held against the scores."""

    condition: Literal["max_critical_tolerance", "min_recovery"]
    task: str
    """The one that decided."""
    bound: float
    found: float | None
    """α* or the recovery; None for α* = ∞ and where there is no recovery."""
    holds: bool
    words: str


def judge(board: Board, student: str, tolerance: float | None, recovery: Mapping[str, float]) -> Iterator[Judgement]:
    """Hold each condition against the scores.

    Args:
        board: of the scores.
        student: one of its students.
        tolerance: largest α*; None: any.
        recovery: task → least recovery.

    Raises:
        Mistake: no such student or task, or a teacher without a score.
    """
    comparison = _comparison(board, student)
    for task in recovery:
        _refuse_task(board, task)
    if tolerance is not None:
        yield _judge_tolerance(comparison, tolerance)
    for task, least in recovery.items():
        yield _judge_recovery(comparison, task, least)


def _judge_tolerance(comparison: Comparison, most: float) -> Judgement:
    star, task, count = comparison.critical_tolerance, comparison.decisive, len(comparison.drops)
    holds = star <= most + SLACK
    place = f"number {math.ceil(count / 2)} of {count} by drop"
    why = "which has no score" if task in comparison.missing else f"whose score drops by {number(star, 3)}"
    words = f"α* {number(star, 3)} {'≤' if holds else '>'} {most:g}: decided by {task}, {why} ({place})"
    return Judgement("max_critical_tolerance", task, most, star if math.isfinite(star) else None, holds, words)


def _judge_recovery(comparison: Comparison, task: str, least: float) -> Judgement:
    found = comparison.recovery[task]
    if task in comparison.missing:
        holds, words = False, f"recovery of {task}: no score, counted as lost (least: {least:g})"
    elif found is None:
        holds, words = True, f"recovery of {task}: the teacher scores 0, a tie (least: {least:g})"
    else:
        holds = found >= least - SLACK
        words = f"recovery of {task} {number(found, 3)} {'≥' if holds else '<'} {least:g}"
    return Judgement("min_recovery", task, least, found, holds, words)


def _comparison(board: Board, student: str) -> Comparison:
    names = [s.name for s in board.students]
    if student not in names:
        raise Mistake(f"--student {student}: has no scores; there are {', '.join(names) or 'none'}")
    return board.comparisons[student]


def _refuse_task(board: Board, task: str) -> None:
    if task in board.lower:
        raise Mistake(f"--min-recovery {task}: lower is better there, so it has no recovery")
    if task not in board.tasks:
        nearest = get_close_matches(task, board.tasks, n=1, cutoff=0.0)[0]
        raise Mistake(f"--min-recovery {task}: no such task; the nearest is {nearest} (all: {', '.join(board.tasks)})")


def board_of_run(run: Path, student: str) -> Board:
    """The scores of a run, if they are of the student and teacher that stand there now.

    Raises:
        Mistake: nothing to compare was scored, or the student was made again since.
    """
    results = collect(run)
    board = results.board
    if results.teacher and results.teacher.failed:
        raise Mistake(
            f"{run.name}: the teacher failed on {', '.join(results.teacher.failed)}; there is nothing to compare with"
        )
    if board is None:
        measured = ", ".join(m.name for m in results.models) or "nothing"
        raise Mistake(
            f"{run.name}: no scores of a teacher and a student on tasks yet (measured: {measured}); see stage=eval"
        )
    for model in results.models:
        if model.stale and model.name in (student, "teacher"):
            raise Mistake(
                f"{run.name}: {model.name} was made again since it was scored; launch again, up to stage=eval"
            )
    return board


def _conditions(arguments: argparse.Namespace) -> dict[str, float]:
    found = {}
    for text in arguments.min_recovery:
        task, equals, value = text.rpartition("=")
        if not task or not equals:
            raise Mistake(f"--min-recovery {text}: expected TASK=RECOVERY, such as gsm8k=0.9")
        found[task] = _share("--min-recovery", text, value)
    return found


def _share(flag: str, text: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise Mistake(f"{flag} {text}: expected a number of 0 or more")
    return share


def main(argv: list[str]) -> int:
    """`gate RUN_DIR|--scores FILE [--student S] [--max-critical-tolerance A] [--min-recovery TASK=R]… [--json]`."""
    parser = argparse.ArgumentParser(prog="xdl gate", description="Whether a student is good enough.")
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--student", default=MERGED)
    parser.add_argument("--max-critical-tolerance", default="")
    parser.add_argument("--min-recovery", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        return _gate(arguments)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except Exception:
        traceback.print_exc()
        return os.EX_SOFTWARE  # Python's own 1 would be a verdict


def _gate(arguments: argparse.Namespace) -> int:
    if (arguments.run is None) == (arguments.scores is None):
        raise Mistake("gate: give a run or --scores FILE, one of them")
    recovery, most = _conditions(arguments), arguments.max_critical_tolerance
    tolerance = _share("--max-critical-tolerance", most, most) if most else None
    if tolerance is not None and tolerance >= 1:
        raise Mistake(f"--max-critical-tolerance {most}: every student passes; expected a share below 1, such as 0.05")
    if tolerance is None and not recovery:
        raise Mistake("gate: no condition; give --max-critical-tolerance A, --min-recovery TASK=R, or both")
    student = arguments.student
    board = read_board(arguments.scores) if arguments.scores else board_of_run(arguments.run, student)
    found = list(judge(board, student, tolerance, recovery))
    holds, missing = all(judgement.holds for judgement in found), board.comparisons[student].missing
    if arguments.json:
        conditions = [asdict(judgement) for judgement in found]
        told = {"student": student, "holds": holds, "conditions": conditions, "without_score": missing}
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return DONE if holds else REFUSED
    for judgement in found:
        print(f"{'pass' if judgement.holds else 'FAIL'} {student}: {judgement.words}")
    if missing:
        print(f"     {student}: without a score, counted as lost: {', '.join(missing)}")
    return DONE if holds else REFUSED
