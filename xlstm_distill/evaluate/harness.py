"""The `eval` stage: each model of the run on held-out text and on tasks. Pieces: the models.

output/tasks/TASK/                         a local task, shared by all models
output/MODEL/heldout.json                  numbers on held-out text by source (`heldout.py`)
output/MODEL/TASK.json  TASK.samples.jsonl one task (`results.py`); the manifest's facts hold all scores

Every rank has a copy of the model (`team.py`). What is finished is not measured again: a task by its key, held-out text
likewise. A task that fails is recorded and reported, the others go on, and in the end the stage fails: a model with a
failed task gets no manifest.
"""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.files import hash_file, hash_value, write_atomic, write_json
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.tasks import PREFIX, lengths_of, source_of_positions, task_names
from xlstm_distill.evaluate import results as kept
from xlstm_distill.evaluate.heldout import Losses, load_hidden, summary
from xlstm_distill.evaluate.lm import run_task, scores_of
from xlstm_distill.evaluate.models import load_tokenizer, precision_of
from xlstm_distill.evaluate.position import position_results, position_samples
from xlstm_distill.evaluate.results import Result
from xlstm_distill.evaluate.suites import Asked, check_tasks
from xlstm_distill.evaluate.tasks.publish import publish
from xlstm_distill.evaluate.team import Team, last_line
from xlstm_distill.evaluate.worker import Worker
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag

UNITS = 100
"""Of progress, for each task and each source of held-out text."""


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Measure this array element's models, the teacher first; one manifest per model.

    Raises:
        Mistake: a model or the held-out data is missing, programs may not be run, or tasks have failed (all of them are
            named).
        Stopped: a stop was requested; finished tasks are kept.
    """
    if world.rank == 0:
        check_tasks(task_names(folder.config), folder.config.eval.allow_code_execution)
    with Team(world, stop) as team:
        worker = Worker(folder, team)
        if world.rank:
            team.serve()
            return {}
        todo = sorted(folder.my_pieces(world), key=lambda name: name != "teacher")
        harness = Harness(folder, team, worker)
        with Metrics(folder.path, total=harness.units * len(todo)) as metrics:
            harness.on_progress = lambda done: metrics.log(done)
            for name in todo:
                facts = harness.measure(name)
                if name not in harness.failed:
                    folder.finish(facts, name)
    if harness.failed:
        lines = [
            f"{task} of {model} ({line})" for model, tasks in harness.failed.items() for task, line in tasks.items()
        ]
        raise Mistake(f"eval: {len(lines)} failed: {'; '.join(lines)}; the others are kept: mend it and launch again")
    return {}


@dataclass
class Harness:
    """What rank 0 does, model by model."""

    folder: JobFolder
    team: Team
    worker: Worker
    on_progress: Callable[[int], None] = lambda done: None
    """Hears the number of finished units."""
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    """Model → task → the last line of its error."""
    done: int = 0
    """Units."""
    told: int = 0
    """The last number that `on_progress` has heard."""

    @property
    def tasks(self) -> tuple[str, ...]:
        return task_names(self.folder.config)

    @property
    def units(self) -> int:
        """Units of one model."""
        return UNITS * (len(self.folder.config.sources) + len(self.tasks))

    def unit(self) -> None:
        """A task or a source is done."""
        self.done += UNITS
        self.told = self.done
        self.on_progress(self.done)

    def _part(self, done: int, total: int) -> None:
        """So much of the task or source at hand is done."""
        now = self.done + min(UNITS - 1, UNITS * done // max(total, 1))
        if now > self.told:
            self.told = now
            self.on_progress(now)

    def measure(self, name: str) -> dict[str, Any]:
        """Measure one model, write what came out and return the facts.

        Raises:
            Mistake: the run has no such model.
        """
        if name not in self.worker.places:
            raise Mistake(f"eval.models: {name}: no model of this run; there are {', '.join(self.worker.places)}")
        self.team.on_items = self._part
        numbers = self.held_out(name)
        scores = {task: score for task in self.tasks if (score := self.task(name, task))}
        return {"scores": scores, "heldout": kept.held_out_facts(numbers)}

    def held_out(self, name: str) -> dict[str, Any]:
        """`heldout.summary` on every source; read back where it stands already."""
        config, worker, folder = self.folder.config, self.worker, self.folder.output / name
        rows = {source: [(source, n) for n in range(len(sample.tokens))] for source, sample in worker.samples.items()}
        asked = [config.eval.samples, config.student.window, precision_of(config)]
        key = hash_value([worker.data_key, self._model_key(name), *asked])
        mark, file = folder / ".heldout.key", folder / "heldout.json"
        if file.is_file() and mark.is_file() and mark.read_text() == key:
            for _ in rows:
                self.unit()
            return dict(json.loads(file.read_text(encoding="utf-8")))
        missing = [] if name == "teacher" else [row for found in rows.values() for row in found if not self._kept(row)]
        if missing:
            self.team.everywhere("load", "teacher")
            self._by_source("hidden", missing)
        self.team.everywhere("load", name)
        numbers = {}
        for source, found in rows.items():
            numbers[source] = summary(
                Losses.joined(self._by_source("heldout", found)), config.data.sequence, config.student.reach
            )
            self.unit()
        write_json(file, numbers)
        write_atomic(mark, key)
        return numbers

    def _kept(self, row: tuple[str, int]) -> bool:
        """Whether the teacher's hidden states on a sequence are there."""
        return load_hidden(self.worker.hidden_path(row), self.worker.hidden_key(row)) is not None

    def _by_source(self, kind: str, rows: list[tuple[str, int]]) -> list[Any]:
        """`share` of sequences: every round is of one source."""
        found: list[Any] = []
        for source in dict.fromkeys(source for source, _ in rows):
            found += self.team.share(
                kind, [row for row in rows if row[0] == source], lambda first: self.folder.config.eval.batch
            )
        return found

    def task(self, name: str, task: str) -> dict[str, Any] | None:
        """The score of one task: as it stands, of a teacher as another run has it, or measured now; None: it failed."""
        folder = self.folder.output / name
        shared = self.folder.path.absolute().parents[2] / kept.SHARED
        try:
            asked, local, key = self._ask(name, task)
            result = kept.read_result(folder, task, key)
            if result is None and name == "teacher":
                result = kept.read_result(shared, f"{task}-{key}", key)
                if result:
                    kept.write_result(folder, task, key, self._made(name), result)
            if result is None:
                result = self._measure(name, asked, local)
                kept.write_result(folder, task, key, self._made(name), result)
                if name == "teacher":
                    _offer(shared, f"{task}-{key}", key, result)
        except Stopped:
            raise
        except Exception as error:
            self._fail(name, task, error)
            return None
        finally:
            self.unit()
        return result.score

    def _fail(self, name: str, task: str, error: Exception) -> None:
        traceback.print_exc()
        line = last_line(error)
        print(f"{task} of {name} failed: {line}", flush=True)
        kept.write_failure(self.folder.output / name, task, self._made(name), line)
        self.failed.setdefault(name, {})[task] = line

    def _ask(self, name: str, task: str) -> tuple[Asked, Path, str]:
        """How a task is asked, the folder of a local one, and the key of its result."""
        config = self.folder.config
        asked = Asked.of(config, task)
        local, content = Path(), ""
        if source_of_positions(task):
            content = hash_value([self.worker.data_key, config.eval.samples, max(lengths_of(config))])
        elif task.startswith(PREFIX):
            local = self._publish(task)
            content = hash_file(local / f"{task}.jsonl")
        key = hash_value([self._model_key(name), asked.settings, content, version("lm_eval"), precision_of(config)])
        return asked, local, key

    def _publish(self, task: str) -> Path:
        config = self.folder.config
        return publish(
            self.folder.output / "tasks" / task,
            [task],
            load_tokenizer(self.worker.places["teacher"]),
            self.worker.shards,
            window=config.student.window,
            sequence=config.data.sequence,
            seed=config.seed,
            key=self.worker.data_key,
            lengths=lengths_of(config),
        )

    def _made(self, name: str) -> str:
        """The digest of the manifest of what made a model; empty for a folder of the user's."""
        place = self.worker.places[name]
        manifest = read_manifest(self.folder.sibling(place.job) / "manifest.json") if place.job else None
        return manifest.digest if manifest else ""

    def _model_key(self, name: str) -> Any:
        """What a model is: the hashes of a teacher's weights and tokenizer, the manifest of what made a student."""
        place = self.worker.places[name]
        if not place.job:  # a folder of the user's
            files = [
                [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(place.folder.iterdir())
            ]
            return [str(place.folder), files, place.overrides]
        manifest = read_manifest(self.folder.sibling(place.job) / "manifest.json")
        if manifest is None:
            raise Mistake(f"{name}: not finished (no {self.folder.sibling(place.job)}/manifest.json)")
        facts = manifest.facts.get("teacher", {}) if name == "teacher" else {}
        if "weights" in facts:
            return [facts["weights"], facts.get("tokenizer", "")]
        return [manifest.digest, place.overrides]

    def _measure(self, name: str, asked: Asked, local: Path) -> Result:
        """Ask the model now."""
        self.team.everywhere("load", name)
        if source := source_of_positions(asked.task):
            length = self.worker.long(source).tokens.shape[1] - 1
            rows = [(source, n) for n in range(len(self.worker.long(source).tokens))]
            lost = self.team.share("positions", rows, lambda first: 1)
            found = position_results(asked.task, lost, length)
            return Result(found, scores_of(found)[asked.task], position_samples(lost))
        if self.worker.lm is None:
            self.team.everywhere("lm", name)
        return run_task(self.worker.lm, asked, local)


def _offer(shared: Path, name: str, key: str, result: Result) -> None:
    """Keep a teacher's result for other runs, where this user may write there."""
    try:
        kept.write_result(shared, name, key, "", result)
    except OSError as error:
        print(f"{name}: not kept for other runs: {error}", flush=True)
