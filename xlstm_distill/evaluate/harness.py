"""The `eval` stage: each model of the run on held-out text and on lm-eval's tasks. Pieces: the models.

output/tasks/                          the local tasks, shared by all models
output/teacher/hidden-SOURCE.safetensors   the teacher's final hidden states, so that it runs once
output/MODEL/heldout.json  results.json    what was measured; the manifest's facts hold the summary
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_value, write_json
from xlstm_distill.contract.job import JobFolder, World, plain
from xlstm_distill.evaluate import heldout
from xlstm_distill.evaluate.lm import evaluate, scores_of
from xlstm_distill.evaluate.models import ModelPlace, load_model, load_tokenizer, model_places
from xlstm_distill.evaluate.tasks.publish import publish
from xlstm_distill.merge import ModelFolder
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

HEADS = ("lm_head.weight", "model.embed_tokens.weight")
"""Names of the LM head in a teacher's files; the second where it is tied."""


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Measure this array element's models, the teacher first; one manifest per model.

    Raises:
        Mistake: a model or the held-out data is missing, a task is unknown.
    """
    if world.rank > 0:
        return {}
    todo = sorted(folder.my_pieces(world), key=lambda name: name != "teacher")
    harness = Harness(folder, stop)
    with Metrics(folder.path, total=harness.units * len(todo)) as metrics:
        harness.on_unit = lambda done: metrics.log(done)
        for name in todo:
            folder.finish(harness.measure(name), name)
    return {}


@dataclass
class Harness:
    """What all models of one job share."""

    folder: JobFolder
    stop: StopFlag
    on_unit: Callable[[int], None] = lambda done: None
    """Hears the number of finished units (held-out batches and tasks)."""
    done: int = 0

    @cached_property
    def places(self) -> dict[str, ModelPlace]:
        return model_places(self.folder.path.parent, self.folder.config)

    @property
    def shards(self) -> dict[str, Path]:
        """Source → folder of its token shards."""
        data = self.folder.config.data
        root = Path(data.shards) if data.shards else self.folder.input("tokenize")
        return {source: root / source for source in self.folder.config.sources}

    @cached_property
    def samples(self) -> dict[str, heldout.Sample]:
        """Source → its held-out sequences."""
        from xlstm_distill.data.stream import read_samples

        count = self.folder.config.eval.samples
        batches = {source: read_samples(path / "validation", count) for source, path in self.shards.items()}
        return {source: heldout.Sample(batch.tokens, batch.mask) for source, batch in batches.items()}

    @property
    def units(self) -> int:
        """Units of one model."""
        batches = sum(-(-len(sample.tokens) // self.folder.config.eval.batch) for sample in self.samples.values())
        return batches + len(self.folder.config.eval.tasks)

    def unit(self) -> None:
        """One unit is done."""
        self.stop.check()
        self.done += 1
        self.on_unit(self.done)

    def measure(self, name: str) -> dict[str, Any]:
        """Measure one model, write what came out and return the facts.

        Raises:
            Mistake: the run has no such model.
        """
        if name not in self.places:
            raise Mistake(f"eval.models: {name}: no model of this run; there are {', '.join(self.places)}")
        model = load_model(self.places[name], self.folder.config.strategy.precision)
        numbers = self.held_out(name, model)
        write_json(self.folder.output / name / "heldout.json", numbers)
        scores = self.tasks(name, model)
        short = ("perplexity", "kl", "kl_within_window", "kl_beyond_window", "agreement", "tokens")
        summary = {source: {key: v for key, v in values.items() if key in short} for source, values in numbers.items()}
        return {"scores": scores, "heldout": summary}

    def held_out(self, name: str, model: "PreTrainedModel") -> dict[str, Any]:
        """`heldout.measure` on every source."""
        config, numbers = self.folder.config, {}
        head = model.get_output_embeddings().weight.detach()
        for source, sample in self.samples.items():
            hidden = heldout.final_hidden(model, sample.tokens[:, :-1], config.eval.batch, self.unit)
            if name == "teacher":
                heldout.save_hidden(self._hidden_path(source), hidden, self._hidden_key(source))
            reference = None if name == "teacher" else self.reference(source, head)
            numbers[source] = heldout.measure(hidden, head, sample, reference, config.student.window)
        return numbers

    def reference(self, source: str, like: "Tensor") -> heldout.Reference:
        """The teacher on a source: its hidden states as its own piece kept them, else computed and kept."""
        hidden = heldout.load_hidden(self._hidden_path(source), self._hidden_key(source))
        if hidden is None:
            teacher = load_model(self.places["teacher"], self.folder.config.strategy.precision)
            tokens = self.samples[source].tokens[:, :-1]
            hidden = heldout.final_hidden(teacher, tokens, self.folder.config.eval.batch, self.stop.check)
            if "teacher" not in self.folder.job.pieces:
                heldout.save_hidden(self._hidden_path(source), hidden, self._hidden_key(source))
        return heldout.Reference(hidden, self.teacher_head.to(like))

    @cached_property
    def teacher_head(self) -> "Tensor":
        files = ModelFolder(self.places["teacher"].folder)
        names = [name for name in HEADS if name in files.entries]
        if not names:
            raise Mistake(f"{files.path}: no LM head in it (looked for {' and '.join(HEADS)})")
        return files.tensor(names[0])

    def tasks(self, name: str, model: "PreTrainedModel") -> dict[str, Any]:
        """Scores on the tasks, one after the other, and lm-eval's own results in `results.json`."""
        config = self.folder.config
        if not config.eval.tasks:
            return {}
        local = self.local_tasks()
        tokenizer = load_tokenizer(self.places[name])
        results: dict[str, Any] = {}
        scores: dict[str, Any] = {}
        for task in config.eval.tasks:
            result = evaluate(
                model,
                tokenizer,
                [task],
                local,
                batch=config.eval.batch,
                limit=config.eval.limit,
                seed=config.seed,
            )
            results[task] = result
            scores |= scores_of(result)
            self.unit()
        write_json(self.folder.output / name / "results.json", _merge_results(results.values()))
        return scores

    def local_tasks(self) -> Path:
        """The folder of the local tasks, made on the first call."""
        config = self.folder.config
        return publish(
            self.folder.output / "tasks",
            config.eval.tasks,
            load_tokenizer(self.places["teacher"]),
            self.shards,
            window=config.student.window,
            sequence=config.data.sequence,
            seed=config.seed,
            key=self._data_key,
        )

    @cached_property
    def _data_key(self) -> Any:
        """What shards and teacher are made from."""
        digests = self.folder.input_digests()
        made_from = {name: digest for name, digest in digests.items() if name in ("fetch", "tokenize")}
        return [made_from, plain(self.folder.config.data.shards)]

    def _hidden_path(self, source: str) -> Path:
        return self.folder.output / "teacher" / f"hidden-{source}.safetensors"

    def _hidden_key(self, source: str) -> str:
        config = self.folder.config
        return hash_value([self._data_key, source, config.eval.samples, config.data.sequence])


def _merge_results(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's results of single tasks as one: its tables by task are joined, the rest is the last one's."""
    merged: dict[str, Any] = {}
    for result in results:
        for key, value in result.items():
            joined = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if joined else value
    return merged
