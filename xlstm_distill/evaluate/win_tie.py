"""Win-and-Tie: how much a student may lose before it stops matching its teacher. Pure; paper §4, the ties are ours.

    drop_b  = max(0, 1 − A_S(b) / A_T(b))          A_S, A_T: score of student and teacher on benchmark b
    tie     ⇔ drop_b ≤ α + 1e-9
    C_α     = share of the benchmarks won or tied
    α*      = inf{α : C_α ≥ 0.5} = the ⌈n/2⌉-th smallest drop

Where the formulas are silent:
    A_T = 0                      a tie (nobody can do worse), recovery is None
    student's score missing, null, NaN or infinite
                                 a loss at every α (drop = ∞), listed in `missing`; 0 in the mean recovery
    teacher's score missing, null, NaN, infinite or negative
                                 refused: there is nothing to compare with
    student's score negative     drop > 1: a loss at every α of [0, 1]; α* may then exceed 1
    lower is better              left out of C_α and of the recovery
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from xlstm_distill.contract.exitcode import Mistake

SLACK = 1e-9
"""Absolute slack on α, so that 1 − 0.98 ties at α = 0.02."""
ALPHAS = tuple(i / 100 for i in range(101))
"""The tolerances of a curve."""


@dataclass(frozen=True)
class Comparison:
    """One student beside its teacher."""

    drops: Mapping[str, float]
    """Task → relative drop, ≥ 0; ∞ where the student has no score."""
    recovery: Mapping[str, float | None]
    """Task → A_S / A_T; None where the teacher scores 0 or the student has no score."""
    missing: tuple[str, ...]
    """Tasks without a usable student score."""

    @property
    def critical_tolerance(self) -> float:
        """α*; ∞ when the student has no score on more than half of the tasks."""
        return self.drops[self.decisive]

    @property
    def decisive(self) -> str:
        """The task whose drop is α*: the ⌈n/2⌉-th by drop, of equal ones the first."""
        return sorted(self.drops, key=self.drops.__getitem__)[math.ceil(len(self.drops) / 2) - 1]

    @property
    def mean_recovery(self) -> float | None:
        """Mean of A_S / A_T, a missing A_S as 0; None where the teacher scores 0 everywhere."""
        values = [0.0 if task in self.missing else value for task, value in self.recovery.items()]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    def win_and_tie(self, alpha: float) -> float:
        """C_α, in [0, 1]."""
        return sum(drop <= alpha + SLACK for drop in self.drops.values()) / len(self.drops)

    def as_json(self) -> dict[str, Any]:
        """`critical_tolerance` (None for ∞), `win_and_tie` by `str(α)`, `recovery`."""
        tolerance = self.critical_tolerance
        return {
            "critical_tolerance": tolerance if math.isfinite(tolerance) else None,
            "win_and_tie": {str(alpha): self.win_and_tie(alpha) for alpha in ALPHAS},
            "recovery": dict(self.recovery),
        }


def compare(
    teacher: Mapping[str, Any], student: Mapping[str, Any], lower_is_better: Collection[str] = (), name: str = "student"
) -> Comparison:
    """Compare a student's scores with its teacher's, task by task.

    Args:
        teacher: task → score.
        student: task → score or None.
        lower_is_better: tasks to leave out.
        name: of the student, for messages.

    Raises:
        Mistake: the teacher has no usable score for a task, or no task is left.
    """
    if unknown := sorted(set(student) - set(teacher)):
        raise Mistake(
            f"scores of {name}: {unknown[0]}: the teacher has no score on this task; add it or leave the task out"
        )
    tasks = [task for task in teacher if task not in lower_is_better]
    if not tasks:
        raise Mistake(
            f"scores of {name}: no task to compare on; give the teacher at least one score where higher is better"
        )
    references = {task: _teacher_score(task, teacher[task]) for task in tasks}
    scores = {task: _student_score(name, task, student.get(task)) for task in tasks}
    return Comparison(
        drops={task: _drop(scores[task], references[task]) for task in tasks},
        recovery={task: _recovery(scores[task], references[task]) for task in tasks},
        missing=tuple(task for task in tasks if scores[task] is None),
    )


def _drop(score: float | None, reference: float) -> float:
    if score is None:
        return math.inf
    return max(0.0, 1 - score / reference) if reference else 0.0


def _recovery(score: float | None, reference: float) -> float | None:
    return score / reference if score is not None and reference else None


def _teacher_score(task: str, value: Any) -> float:
    number = _number("teacher", task, value)
    if number is None or number < 0:
        raise Mistake(f"scores of teacher: {task}={value}: expected a finite number ≥ 0; mend it or leave the task out")
    return number


def _student_score(name: str, task: str, value: Any) -> float | None:
    return _number(name, task, value)


def _number(name: str, task: str, value: Any) -> float | None:
    """`value` as a float; None for null, NaN and infinities."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Mistake(f"scores of {name}: {task}={value!r}: expected a number")
    return float(value) if math.isfinite(value) else None
