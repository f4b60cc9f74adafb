"""What a run has measured so far, read from its manifests and metrics. A run need not be finished."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.manifest import Manifest, read_manifest
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.tasks import source_of_positions, task_names
from xlstm_distill.evaluate.board import Board, Score, Student, read_samples, score_of
from xlstm_distill.evaluate.domains import domains_of
from xlstm_distill.evaluate.models import ModelPlace, model_places
from xlstm_distill.evaluate.results import held_out_facts, read_scores
from xlstm_distill.evaluate.win_tie import Comparison
from xlstm_distill.runtime.metrics import read_metrics

LABELS = {"window": "window + sinks, untrained", "aligned": "aligned", "merged": "merged", "teacher": "teacher"}


@dataclass(frozen=True)
class Measured:
    """One model's numbers."""

    name: str
    heldout: dict[str, dict[str, float]] = field(default_factory=dict)
    """Source → `kl`, `perplexity`, …"""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task → `score`, `stderr`, `higher_is_better`."""
    positions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Source → `{"bucket": …, "kl": […]}`."""
    long: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Source → `{"edges": […], "ce": […]}` of sequences longer than the training's (`evaluate/position.py`)."""
    union: bool = False
    """Whether it is a generalist: trained on the mixtures of several experts."""
    folder: Path | None = None
    """Where `eval` wrote what it measured, with the samples of each task."""
    stale: bool = False
    """Whether the model was made again since it was measured."""

    @property
    def label(self) -> str:
        """Name in tables."""
        return LABELS.get(self.name, self.name if self.union else f"expert {self.name}")

    @property
    def failed(self) -> dict[str, str]:
        """Task → how it failed."""
        return _failed(self.scores)

    @cached_property
    def board_scores(self) -> dict[str, Score]:
        """Task → score, with its samples where there are any."""
        found = {}
        for task, record in self.scores.items():
            samples = read_samples(self.folder / f"{task}.samples.jsonl") if self.folder else {}
            found[task] = score_of(record, samples)
        return found


@dataclass(frozen=True)
class Results:
    """Everything that a report shows."""

    name: str
    models: list[Measured]
    """In the order of the table: baseline, students, teacher last; those that are measured."""
    align: dict[str, Any]
    """Facts of Stage I; empty while it is not finished."""
    distill: dict[str, dict[str, Any]]
    """Expert → facts of Stage II."""
    merge: dict[str, Any]
    curves: dict[str, list[dict[str, float]]]
    """Job → its metrics."""
    window: int = 0
    missing: tuple[str, ...] = ()
    """Models that the run will have and that are not measured."""
    experts: tuple[str, ...] = ()
    """Those that are merged."""
    unions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Generalist → the experts on whose mixtures it was trained."""
    domain: Mapping[str, str] = field(default_factory=dict)
    """Task → its domain."""
    others: tuple[Student, ...] = ()
    """Students of other runs."""

    @property
    def teacher(self) -> Measured | None:
        return next((m for m in self.models if m.name == "teacher"), None)

    @property
    def students(self) -> list[Measured]:
        return [m for m in self.models if m.name != "teacher"]

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(source for m in self.models for source in m.heldout))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for m in self.models for task in m.scores))

    @property
    def gates(self) -> dict[str, list[list[float]]]:
        """Label of each student whose training recorded them → mean output gate per layer and head."""
        facts = {"aligned": self.align, **self.distill}
        labels = {name: Measured(name, union=name in self.unions).label for name in facts}
        return {labels[name]: found["output_gate"] for name, found in facts.items() if found.get("output_gate")}

    def lower_is_better(self) -> set[str]:
        """Tasks that stay out of Win-and-Tie."""
        return {t for m in self.models for t, s in m.scores.items() if not s.get("higher_is_better", True)}

    @cached_property
    def board(self) -> Board | None:
        """Teacher and students; None without a teacher, where it failed on a task, or without tasks where higher is
        better."""
        lower = self.lower_is_better()
        if self.teacher is None or self.teacher.failed or not set(self.teacher.scores) - lower:
            return None
        teacher = self.teacher.board_scores
        every = (*(Student(m.name, m.board_scores, teacher) for m in self.students), *self.others)
        students = tuple(replace(s, scores={t: x for t, x in s.scores.items() if t in teacher}) for s in every)
        return Board(teacher, students, frozenset(lower), self.domain, self.experts, tuple(self.unions))

    def comparisons(self) -> dict[str, Comparison]:
        """Student → Win-and-Tie against the teacher; empty without a teacher or without tasks."""
        return self.board.comparisons if self.board else {}


def collect(run: Path) -> Results:
    """Read the run folder `run`.

    Raises:
        Mistake: it is no run folder.
    """
    jobs = run / "jobs"
    config = read_config(run)
    places = {name: place for name, place in model_places(jobs, config).items() if _made(name, config)}
    unions = {name: config.expert[name].union_of for name in config.experts if name not in config.specialists}
    measured = {name: _measured(place, jobs, config, union=name in unions) for name, place in places.items()}
    found = [m for m in measured.values() if m]
    wanted = config.eval.models or tuple(measured)
    training = [
        path.name for path in sorted(jobs.iterdir()) if path.name == "align" or path.name.startswith("distill-")
    ]
    return Results(
        name=run.name,
        models=found,
        align=_facts(jobs / "align"),
        distill={name: _facts(jobs / f"distill-{name}") for name in config.experts},
        merge=_facts(jobs / "merge"),
        curves={name: records for name in training if (records := read_metrics(jobs / name))},
        window=config.student.reach,
        missing=tuple(name for name, m in measured.items() if not m and name in wanted),
        experts=config.specialists,
        unions=unions,
        domain=domains_of(config, dict.fromkeys(task for m in found for task in m.scores)),
    )


def _made(name: str, config: Config) -> bool:
    return name != "merged" or bool(config.specialists)


def read_config(run: Path) -> Config:
    """The configuration of a run, as its newest job has it.

    Raises:
        Mistake: `run` holds no job.
    """
    found = sorted((run / "jobs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Mistake(f"{run}: not a run folder (no jobs/*/config.yaml in it); give runs/NAME")
    return JobFolder.read(found[-1].parent).config


def _measured(place: ModelPlace, jobs: Path, config: Config, union: bool) -> Measured | None:
    """What `eval` measured on a model; None while it is at it. Of one that failed on a task, what it has."""
    manifest, folder = (
        read_manifest(jobs / "eval" / "pieces" / f"{place.name}.json"),
        jobs / "eval" / "output" / place.name,
    )
    made = read_manifest(jobs / place.job / "manifest.json") if place.job else None
    numbers: dict[str, Any] = {}
    if (folder / "heldout.json").is_file():
        numbers = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))
    positions = {source: values["positions"] for source, values in numbers.items() if "positions" in values}
    if manifest is None:
        tasks = task_names(config)  # those of earlier settings may lie there too
        found = read_scores(folder, made.digest if made else "")
        scores = {task: record for task, record in found.items() if task in tasks}
        if not _failed(scores):
            return None
        heldout = held_out_facts(numbers)  # measured before the tasks, so of the same model
        return Measured(place.name, heldout, scores, positions, _long(folder, scores), union, folder)
    return Measured(
        name=place.name,
        heldout=dict(manifest.facts.get("heldout", {})),
        scores=dict(manifest.facts.get("scores", {})),
        positions=positions,
        long=_long(folder, manifest.facts.get("scores", {})),
        union=union,
        folder=folder,
        stale=place.job in manifest.inputs and (made is None or made.digest != manifest.inputs[place.job]),
    )


def _long(folder: Path, tasks: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """The curves over positions among the results of `tasks`."""
    named = {source: folder / f"{task}.json" for task in tasks if (source := source_of_positions(task))}
    found = {source: json.loads(file.read_text(encoding="utf-8")) for source, file in named.items() if file.is_file()}
    return {source: result["positions"] for source, result in found.items()}


def _failed(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Task → how it failed."""
    return {task: str(record["failed"]) for task, record in scores.items() if "failed" in record}


def _facts(job: Path) -> dict[str, Any]:
    manifest: Manifest | None = read_manifest(job / "manifest.json")
    return dict(manifest.facts) if manifest else {}


def beside(run: Path, model: str, own: Path) -> Student:
    """A student of another run, with that run's own teacher: it may have been asked other items.

    Args:
        run: folder of the other run.
        model: one of its models; empty: the merged student.
        own: folder of the run that it stands beside.

    Raises:
        Mistake: it is no run, has not measured that model and a teacher, or has another teacher.
    """
    other, model = collect(run), model or "merged"
    known = {m.name: m for m in other.students}
    if other.teacher is None or other.teacher.failed or model not in known:
        raise Mistake(
            f"--beside {run.name}:{model}: not measured there together with its teacher; measured: "
            f"{', '.join(m.name for m in other.models) or 'none'}"
        )
    ours, theirs = (_facts(place / "jobs" / "fetch").get("teacher", {}).get("weights") for place in (own, run))
    if ours and theirs and ours != theirs:
        raise Mistake(
            f"--beside {run.name}:{model}: has another teacher than {own.name}; their scores are not comparable"
        )
    return Student(f"{run.name}:{model}", known[model].board_scores, other.teacher.board_scores)
