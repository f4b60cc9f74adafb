"""The verdict as tables, notes and JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from xlstm_distill.evaluate.bootstrap import REPLICATES, Interval
from xlstm_distill.evaluate.tables import Table, number
from xlstm_distill.evaluate.verdict import MERGED, TOLERANCES, Change, Estimate, Verdict, Verdicts

NOTE = (
    "Recovery: student / teacher. C_α: share of the tasks on which the student loses at most α of the teacher's score; "
    "α*: the smallest α at which that is half of them. In brackets percentile bootstrap intervals of 95 % "
    f"({REPLICATES:,} replicates): over samples (the items of each task drawn anew, the same ones for all models) and "
    "over tasks (the tasks drawn anew)."
)
CHANGES_NOTE = (
    "Mean recovery of the merged student less the other's, both drawn together; better, worse: the interval over "
    "samples leaves out 0. The best expert is picked by these scores, so some of its advantage is luck."
)
SPREADS = {
    "paired": "",
    "unpaired": "the models were not asked the same items, which are drawn apart",
    "normal": "no scores per item, so scores are drawn from a normal distribution with the standard error, apart",
    "none": "of at least one model neither scores per item nor a standard error: taken as exact",
}
"""How the spread of a task is known → what the report says about it."""


def verdict_table(verdicts: Verdicts, short: bool = False) -> Table:
    """One row per student: C_α, α* and mean recovery with their intervals.

    Args:
        verdicts: on some students.
        short: fewer figures, for a narrow terminal; so in the other tables.
    """
    tolerances = [alpha for alpha in TOLERANCES if not short or alpha != 0.01]
    header = ["student", *(f"C_{alpha:g}" for alpha in tolerances)]
    header += ["α*", "samples", "tasks", "recovery", "samples", "tasks"]
    rows = []
    for name, verdict in verdicts.students.items():
        cells = [number(verdict.rates[alpha].value, 2) for alpha in tolerances]
        for estimate in (verdict.critical_tolerance, verdict.mean_recovery):
            cells += [number(estimate.value, 3), *(brackets(i, short) for i in (estimate.samples, estimate.tasks))]
        rows.append([name, *cells])
    return header, rows


def recovery_table(verdicts: Verdicts, short: bool = False) -> Table:
    """One row per task: the teacher's score, each student's recovery with its interval over samples."""
    board = verdicts.board
    rows = []
    for task in board.tasks:
        cells = [cell(verdict.recovery[task], short) for verdict in verdicts.students.values()]
        rows.append([task, number(board.teacher[task].value, 3), *cells])
    return ["task", "teacher", *verdicts.students], rows


def domain_table(verdicts: Verdicts, short: bool = False) -> Table:
    """One row per domain: its number of tasks, each student's mean recovery with its interval over samples."""
    rows = []
    for domain, tasks in verdicts.board.domains.items():
        cells = [cell(verdict.domains[domain], short) for verdict in verdicts.students.values()]
        rows.append([domain, str(len(tasks)), *cells])
    return ["domain", "tasks", *verdicts.students], rows


def change_table(verdicts: Verdicts, short: bool = False) -> Table:
    """One row per domain and other student."""
    rows = []
    for change, why in _joined(verdicts.changes):
        found = change.difference
        intervals = [found.samples] if short else [found.samples, found.tasks]
        ends = [brackets(ends, short, sign=True) for ends in intervals]
        name = f"{change.domain}: merged against {change.against}{why}"
        rows.append([name, figure(found.value, False, sign=True), *ends, change.outcome])
    return ["domain", "difference", "samples", *([] if short else ["tasks"]), "outcome"], rows


def _joined(changes: Sequence[Change]) -> list[tuple[Change, str]]:
    """Changes, and in words why the other student was chosen; an expert that is the best and the own stands once."""
    found: dict[tuple[str, str], tuple[Change, list[str]]] = {}
    for change in changes:
        _, kinds = found.setdefault((change.domain, change.against), (change, []))
        kinds += [change.kind.removesuffix(" expert")] if change.kind.endswith(" expert") else []
    return [(change, f" ({' and '.join(kinds)} expert)" if kinds else "") for change, kinds in found.values()]


def notes(verdicts: Verdicts) -> list[str]:
    """What has to be known beside the numbers: lost tasks, how the spread is known, other items."""
    lost = {name: c.missing for name, c in verdicts.comparisons.items() if c.missing}
    lines = [f"Without a score, counted as lost: {name}: {', '.join(tasks)}." for name, tasks in lost.items()]
    for kind, words in SPREADS.items():
        if words and (tasks := [task for task, found in verdicts.spread.items() if found == kind]):
            lines.append(f"Over samples, {', '.join(tasks)}: {words}.")
    for student in verdicts.board.students:
        other = [
            task
            for task in verdicts.board.tasks
            if verdicts.board.reference(student, task).value != verdicts.board.teacher[task].value
        ]
        if other:
            lines.append(
                f"{student.name} is held against its own run's teacher, which scored otherwise: {', '.join(other)}."
            )
    return lines


def cell(estimate: Estimate, short: bool = False) -> str:
    """`0.982 [0.910, 1.041]`, or `0.982 [.91,1.04]`."""
    return " ".join(filter(None, [number(estimate.value, 3), brackets(estimate.samples, short)]))


def brackets(found: Interval | None, short: bool = False, sign: bool = False) -> str:
    """`[0.910, 1.041]`, or `[.91,1.04]`; empty for None."""
    if found is None:
        return ""
    return "[" + ("," if short else ", ").join(figure(end, short, sign) for end in found) + "]"


def figure(value: float | None, short: bool = False, sign: bool = False) -> str:
    """A number of three decimals, or of two without a leading 0; with `sign` `+` or `−` before it."""
    if value is None:
        return number(None, 3)
    text = number(abs(value), 2 if short else 3)
    mark = "−" if value < 0 else "+" if sign else ""
    return mark + (text.removeprefix("0") if short else text)


def verdicts_json(verdicts: Verdicts) -> dict[str, Any]:
    """Student → its verdict; what merging changed stands with the merged student, under `against`."""
    found = {name: _json(verdict) for name, verdict in verdicts.students.items()}
    if verdicts.changes:
        found[MERGED]["against"] = [
            {"domain": c.domain, "student": c.against, "kind": c.kind, "outcome": c.outcome, **_estimate(c.difference)}
            for c in verdicts.changes
        ]
    return found


def _json(verdict: Verdict) -> dict[str, Any]:
    return {
        **verdict.comparison.as_json(),
        "mean_recovery": verdict.mean_recovery.value,
        "missing": list(verdict.comparison.missing),
        "domains": {domain: _estimate(estimate) for domain, estimate in verdict.domains.items()},
        "intervals": {
            "critical_tolerance": _intervals(verdict.critical_tolerance),
            "mean_recovery": _intervals(verdict.mean_recovery),
            "win_and_tie": {str(alpha): _intervals(estimate) for alpha, estimate in verdict.rates.items()},
            "recovery": {task: _intervals(estimate) for task, estimate in verdict.recovery.items()},
        },
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": _finite(estimate.value), **_intervals(estimate)}


def _intervals(estimate: Estimate) -> Mapping[str, Any]:
    ends = {"samples": estimate.samples, "tasks": estimate.tasks}
    return {name: [_finite(end) for end in found] if found else None for name, found in ends.items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
