"""Scores → the verdict: C_α, α* and recovery with intervals, per student, task and domain, and what merging changed.

The recovery of several tasks is the mean of theirs: a task without a score counts as 0, one on which the teacher scores
0 has none and stays out. A replicate in which the teacher scores 0 on a task is a tie there, as paper §4 has it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from xlstm_distill.evaluate.board import Board, Score
from xlstm_distill.evaluate.bootstrap import REPLICATES, Floats, Interval, draw_scores, draw_tasks, interval, spread
from xlstm_distill.evaluate.win_tie import SLACK, Comparison

TOLERANCES = (0.0, 0.01, 0.05, 0.1)
"""α at which reports give C_α."""
MERGED = "merged"
TEACHER = "teacher"
ALL = "all tasks"
LOST = ([0.0], [math.inf])
"""Recovery and drop without a score."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % intervals."""

    value: float | None
    """None: not defined."""
    samples: Interval | None = None
    """Over samples; None where nothing is known of the spread, or the number is not defined."""
    tasks: Interval | None = None
    """Over tasks; None where there is one."""


@dataclass(frozen=True)
class Verdict:
    """One student."""

    comparison: Comparison
    critical_tolerance: Estimate
    """α*; ∞ where most tasks have no score."""
    rates: Mapping[float, Estimate]
    """α → C_α, at `TOLERANCES`."""
    mean_recovery: Estimate
    recovery: Mapping[str, Estimate]
    """Task → recovery."""
    domains: Mapping[str, Estimate]
    """Domain → mean recovery of its tasks."""


@dataclass(frozen=True)
class Change:
    """Mean recovery of one student less that of another, on one domain."""

    domain: str
    against: str
    """The other student."""
    kind: str
    """Why it: `best expert`, `own expert`, `generalist`."""
    difference: Estimate

    @property
    def outcome(self) -> str:
        """`better` or `worse` where the interval over samples leaves out 0, else `undecided`."""
        found = self.difference.samples
        if found is None:
            return "undecided"
        return "better" if found.low > 0 else "worse" if found.high < 0 else "undecided"


@dataclass(frozen=True)
class Matrix:
    """Tasks of a student: as measured [1, B], and their replicates over samples [R, B]."""

    recovery: Floats
    """NaN where the teacher scores 0, 0 where the student has no score."""
    drops: Floats
    """∞ where the student has no score."""


class Verdicts:
    """All students of a board."""

    def __init__(self, board: Board, replicates: int = REPLICATES) -> None:
        """Compare every student with its teacher.

        Raises:
            Mistake: a teacher has no usable score on a task.
        """
        self.board, self.replicates = board, replicates
        self.comparisons = board.comparisons
        self.spread: dict[str, str] = {}
        """Task → how its spread is known (`bootstrap.spread`)."""
        self._exact: set[tuple[str, str]] = set()
        """Student and task, where nothing is known of the spread of its score or of its teacher's."""
        names, tasks = list(self.comparisons), board.tasks
        point = {name: np.empty((2, 1, len(tasks))) for name in names}
        drawn = {name: np.empty((2, replicates, len(tasks))) for name in names}
        for column, task in enumerate(tasks):
            for name, (measured, replicated) in self._task(task).items():
                point[name][:, :, column], drawn[name][:, :, column] = measured, replicated
        self._point = {name: Matrix(*values) for name, values in point.items()}
        self._drawn = {name: Matrix(*values) for name, values in drawn.items()}

    def _task(self, task: str) -> dict[str, tuple[Any, Any]]:
        """Student → recovery and drop on a task, as measured and replicated."""
        pairs = {s.name: (self.board.reference(s, task), s.scores.get(task, Score(None))) for s in self.board.students}
        models = {name: score for name, (_, score) in pairs.items() if score.usable}
        teachers = {id(teacher): teacher for teacher, _ in pairs.values()}
        keys = {key: f"{TEACHER} {i}" for i, key in enumerate(teachers)}  # a run's own, and those of other runs
        models |= {keys[key]: teacher for key, teacher in teachers.items()}
        self.spread[task] = spread(list(models.values()))
        drawn = draw_scores(task, models, self.replicates)
        found: dict[str, tuple[Any, Any]] = dict.fromkeys(pairs, (LOST, LOST))
        for name, (teacher, score) in pairs.items():
            if spread([teacher, score]) == "none":
                self._exact.add((name, task))
            if score.usable:
                measured = _ratios(np.array([float(score.value)]), np.array([float(teacher.value)]))
                found[name] = measured, _ratios(drawn[name], drawn[keys[id(teacher)]])
        return found

    @cached_property
    def students(self) -> dict[str, Verdict]:
        """Student → its verdict."""
        return {name: self._verdict(name) for name in self.comparisons}

    def _verdict(self, name: str) -> Verdict:
        every = range(len(self.board.tasks))
        half = math.ceil(len(every) / 2) - 1

        def estimate(columns: Sequence[int], statistic: Callable[[Matrix], Floats]) -> Estimate:
            return self._estimate([name], columns, statistic)

        return Verdict(
            comparison=self.comparisons[name],
            critical_tolerance=estimate(every, lambda m: np.sort(m.drops, axis=1)[:, half]),
            rates={alpha: estimate(every, partial(_rate, alpha)) for alpha in TOLERANCES},
            mean_recovery=estimate(every, _mean_recovery),
            recovery={task: estimate([i], _mean_recovery) for i, task in enumerate(self.board.tasks)},
            domains={domain: estimate(columns, _mean_recovery) for domain, columns in self._columns.items()},
        )

    @cached_property
    def _columns(self) -> dict[str, list[int]]:
        place = {task: i for i, task in enumerate(self.board.tasks)}
        return {domain: [place[task] for task in tasks] for domain, tasks in self.board.domains.items()}

    def _estimate(self, names: Sequence[str], columns: Sequence[int], statistic: Callable[..., Floats]) -> Estimate:
        """A statistic of some students on some tasks: their matrices [R, B] → [R]. All are drawn together."""
        chosen = list(columns)
        point = [_pick(self._point[name], lambda a: a[:, chosen]) for name in names]
        value = float(statistic(*point)[0])
        if math.isnan(value):
            return Estimate(None)
        drawn = [_pick(self._drawn[name], lambda a: a[:, chosen]) for name in names]
        known = any((name, self.board.tasks[i]) not in self._exact for name in names for i in chosen)
        over_samples = interval(statistic(*drawn)) if known else None
        if len(chosen) < 2:
            return Estimate(value, over_samples)
        tasks = draw_tasks(len(chosen), self.replicates)
        return Estimate(value, over_samples, interval(statistic(*(_pick(m, lambda a: a[0][tasks]) for m in point))))

    def difference(self, name: str, other: str, columns: Sequence[int]) -> Estimate:
        """Mean recovery of one student less that of another on some tasks."""
        return self._estimate([name, other], columns, lambda a, b: _mean_recovery(a) - _mean_recovery(b))

    @cached_property
    def changes(self) -> list[Change]:
        """What merging changed: per domain, and on all tasks (`ALL`), against the best expert there, the domain's own
        expert and each generalist; of those that were measured.

        The best expert is the one with the highest mean recovery as measured, so some of its advantage is luck.
        """
        if MERGED not in self._point:
            return []
        experts = [name for name in self.board.experts if name in self._point]
        unions = [name for name in self.board.unions if name in self._point]
        found = []
        for domain, columns in {**self._columns, ALL: list(range(len(self.board.tasks)))}.items():
            known = {name: self._estimate([name], columns, _mean_recovery).value for name in experts}
            ranked = sorted((value, name) for name, value in known.items() if value is not None)
            others = [("best expert", ranked[-1][1])] if ranked else []
            others += [("own expert", domain)] if known.get(domain) is not None else []
            others += [("generalist", union) for union in unions]
            found += [Change(domain, other, kind, self.difference(MERGED, other, columns)) for kind, other in others]
        return found


def _ratios(student: Floats, teacher: Floats) -> tuple[Floats, Floats]:
    """Recovery and drop [R]; a teacher that scores 0 is a tie without recovery."""
    zero = teacher == 0
    recovery = np.divide(student, teacher, where=~zero, out=np.full_like(student, math.nan))
    return recovery, np.where(zero, 0.0, np.maximum(0.0, 1 - recovery))


def _mean_recovery(matrix: Matrix) -> Floats:
    """Mean over the tasks that have one [R, B] → [R]; NaN where none has."""
    known = ~np.isnan(matrix.recovery)
    count = known.sum(axis=1)
    total = np.where(known, matrix.recovery, 0.0).sum(axis=1)
    return np.divide(total, count, where=count > 0, out=np.full(len(total), math.nan))


def _rate(alpha: float, matrix: Matrix) -> Floats:
    """C_α [R, B] → [R]."""
    return np.asarray((matrix.drops <= alpha + SLACK).mean(axis=1))


def _pick(matrix: Matrix, columns: Callable[[Floats], Floats]) -> Matrix:
    return Matrix(columns(matrix.recovery), columns(matrix.drops))
