"""What a run has measured so far, read from its manifests and metrics. A run need not be finished."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.gates import heads_shut
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.manifest import Manifest, read_manifest
from xlstm_distill.contract.schema import Config
from xlstm_distill.evaluate.models import model_places
from xlstm_distill.evaluate.win_tie import Comparison, compare
from xlstm_distill.runtime.metrics import read_metrics

LABELS = {"window": "window + sinks, untrained", "aligned": "aligned", "merged": "merged", "teacher": "teacher"}
LAYER_LIMIT, MEAN_LIMIT = 0.8, 0.5
"""Alignment should leave at most these shares of the untrained error, in each layer and on average."""


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

    @property
    def label(self) -> str:
        """Name in tables."""
        return LABELS.get(self.name, f"expert {self.name}")


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
        return {Measured(name).label: found["output_gate"] for name, found in facts.items() if found.get("output_gate")}

    def lower_is_better(self) -> set[str]:
        """Tasks that stay out of Win-and-Tie."""
        return {t for m in self.models for t, s in m.scores.items() if not s.get("higher_is_better", True)}

    def comparisons(self) -> dict[str, Comparison]:
        """Student → Win-and-Tie against the teacher; empty without a teacher or without tasks."""
        lower = self.lower_is_better()
        if self.teacher is None or not set(self.teacher.scores) - lower:
            return {}
        reference = {task: score["score"] for task, score in self.teacher.scores.items()}
        found = {}
        for student in self.students:
            if student.scores:
                scores = {task: s["score"] for task, s in student.scores.items() if task in reference}
                found[student.name] = compare(reference, scores, lower, student.name)
        return found


def collect(run: Path) -> Results:
    """Read the run folder `run`.

    Raises:
        Mistake: it is no run folder.
    """
    jobs = run / "jobs"
    config = read_config(run)
    measured = {name: _measured(jobs / "eval", name) for name in model_places(jobs, config)}
    wanted = config.eval.models or tuple(measured)
    training = [
        path.name for path in sorted(jobs.iterdir()) if path.name == "align" or path.name.startswith("distill-")
    ]
    return Results(
        name=run.name,
        models=[m for m in measured.values() if m],
        align=_facts(jobs / "align"),
        distill={name: _facts(jobs / f"distill-{name}") for name in config.experts},
        merge=_facts(jobs / "merge"),
        curves={name: records for name in training if (records := read_metrics(jobs / name))},
        window=config.student.window,
        missing=tuple(name for name, m in measured.items() if not m and name in wanted),
    )


def read_config(run: Path) -> Config:
    """The configuration of a run, as its newest job has it.

    Raises:
        Mistake: `run` holds no job.
    """
    found = sorted((run / "jobs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Mistake(f"{run}: not a run folder (no jobs/*/config.yaml in it); give runs/NAME")
    return JobFolder.read(found[-1].parent).config


def _measured(job: Path, name: str) -> Measured | None:
    manifest = read_manifest(job / "pieces" / f"{name}.json")
    if manifest is None:
        return None
    positions: dict[str, Any] = {}
    detail = job / "output" / name / "heldout.json"
    if detail.is_file():
        numbers = json.loads(detail.read_text(encoding="utf-8"))
        positions = {source: values["positions"] for source, values in numbers.items() if "positions" in values}
    return Measured(name, dict(manifest.facts.get("heldout", {})), dict(manifest.facts.get("scores", {})), positions)


def _facts(job: Path) -> dict[str, Any]:
    manifest: Manifest | None = read_manifest(job / "manifest.json")
    return dict(manifest.facts) if manifest else {}


def checks(results: Results) -> list[tuple[bool, str]]:
    """Whether the run came out as it should: `(passed, what was found)`, in words."""
    return [*_alignment_checks(results), *_heldout_checks(results)]


def _alignment_checks(results: Results) -> list[tuple[bool, str]]:
    before, after = results.align.get("error_before"), results.align.get("error_after")
    if not before or not after:
        return []
    shares = [a / b if b else 0.0 for a, b in zip(after, before, strict=True)]
    high = [f"{layer} ({share:.2f})" for layer, share in enumerate(shares) if share >= LAYER_LIMIT]
    mean = sum(after) / sum(before)
    found = [
        (
            not high,
            f"alignment error of every layer below {LAYER_LIMIT} of untrained"
            + (f": not so in layers {_few(high)}" if high else f" (highest {max(shares):.2f})"),
        ),
        (mean < MEAN_LIMIT, f"mean alignment error below {MEAN_LIMIT} of untrained ({mean:.2f})"),
    ]
    gates = results.align.get("output_gate")
    if gates:
        shut = [f"{layer}.{head}" for layer, head in heads_shut(gates)]
        found.append((not shut, "no head shut" + (f": layer.head {_few(shut)}" if shut else "")))
    return found


def _few(names: list[str], most: int = 5) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _heldout_checks(results: Results) -> list[tuple[bool, str]]:
    models = {m.name: m for m in results.models}
    found = []
    pairs = [("window", "aligned"), *(("aligned", name) for name in results.distill), ("aligned", "merged")]
    for worse, better in pairs:
        if worse not in models or better not in models:
            continue
        a, b = models[worse].heldout, models[better].heldout
        changes = {source: (a[source]["kl"], b[source]["kl"]) for source in a if source in b}
        words = ", ".join(f"{source} {old:.3f} → {new:.3f}" for source, (old, new) in changes.items())
        # An expert is judged by its own domain; every other student by all.
        own = results.distill.get(better, {}).get("validation", {}).get("end", changes)
        judged = [new < old for source, (old, new) in changes.items() if source in own]
        on = f" on {', '.join(own)}" if better in results.distill else ""
        found.append((bool(judged) and all(judged), f"held-out KL, {worse} → {better}, lower{on}: {words}"))
    return found
