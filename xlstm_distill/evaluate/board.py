"""Scores of a teacher and of any number of students, wherever they come from: a run, several runs, a table.

Beside a score may stand what is known of its spread: a score per item (`samples`), or a standard error.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from xlstm_distill.contract.files import read_lines
from xlstm_distill.evaluate.win_tie import Comparison, compare

SAME = 1e-6
"""A task's score is the mean of its samples where the two differ by no more, relative to 1 or to the score."""


@dataclass(frozen=True)
class Score:
    """A model on a task."""

    value: Any
    """What was recorded; None where nothing was."""
    stderr: float | None = None
    samples: Mapping[str, float] = field(default_factory=dict, repr=False)
    """Id of an item → its score; their mean is `value`. Empty: not known."""

    @property
    def usable(self) -> bool:
        """Whether it is a finite number."""
        return isinstance(self.value, int | float) and math.isfinite(self.value)


@dataclass(frozen=True)
class Student:
    """A student, and its teacher on the same items."""

    name: str
    scores: Mapping[str, Score]
    teacher: Mapping[str, Score]
    """Of a student of another run: as that run measured it."""


@dataclass(frozen=True)
class Board:
    """What a verdict is about."""

    teacher: Mapping[str, Score]
    students: tuple[Student, ...]
    lower: frozenset[str] = frozenset()
    """Tasks where lower is better: they stay out."""
    domain: Mapping[str, str] = field(default_factory=dict)
    """Task → its domain."""
    experts: tuple[str, ...] = ()
    """Students that were merged."""
    unions: tuple[str, ...] = ()
    """Generalists: students on the experts' mixtures together."""

    @property
    def tasks(self) -> list[str]:
        """Tasks that count."""
        return [task for task in self.teacher if task not in self.lower]

    @property
    def domains(self) -> dict[str, list[str]]:
        """Domain → its tasks that count."""
        found: dict[str, list[str]] = {}
        for task in self.tasks:
            found.setdefault(self.domain.get(task, "other"), []).append(task)
        return found

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Student → Win-and-Tie.

        Raises:
            Mistake: a teacher has no usable score on a task, or none on one that a student has.
        """
        return {student.name: self._compare(student) for student in self.students}

    def check(self) -> None:
        """Refuse what `comparisons` refuses."""
        self.comparisons  # noqa: B018

    def reference(self, student: Student, task: str) -> Score:
        """The teacher's score that a student is held against."""
        return student.teacher.get(task, self.teacher[task])

    def _compare(self, student: Student) -> Comparison:
        reference = {task: self.reference(student, task).value for task in self.teacher}
        scores = {task: score.value for task, score in student.scores.items()}
        return compare(reference, scores, self.lower, student.name)


def score_of(record: Mapping[str, Any], samples: Mapping[str, float]) -> Score:
    """A score as `eval` records it; samples whose mean it is not (an F1, a group of tasks) are left out."""
    value, stderr = record.get("score"), record.get("stderr")
    known = Score(value, float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None)
    if not samples or not known.usable:
        return known
    mean, value = math.fsum(samples.values()) / len(samples), float(known.value)
    return Score(value, known.stderr, samples) if abs(mean - value) <= SAME * max(1.0, abs(value)) else known


def read_samples(path: Path) -> dict[str, float]:
    """Id → score of a `TASK.samples.jsonl`, one `{"id": …, "score": …}` per line; empty where there is none, or where
    a line is without a number or an id stands twice (then they are not the items that were scored)."""
    return samples_of(read_lines(path))


def samples_of(items: Iterable[Any]) -> dict[str, float]:
    """Id → score; empty where that is not what the items are."""
    found: dict[str, float] = {}
    for item in items:
        score = item.get("score") if isinstance(item, Mapping) else None
        if not isinstance(score, int | float) or not math.isfinite(score) or str(item.get("id")) in found:
            return {}
        found[str(item.get("id"))] = float(score)
    return found
