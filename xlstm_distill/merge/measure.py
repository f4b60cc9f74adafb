"""What a merge is worth before it is written: held-out KL and tasks of a student that its tensors are swapped into."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from xlstm_distill.contract.files import hash_value
from xlstm_distill.contract.job import JobFolder, plain
from xlstm_distill.contract.tasks import expand, lengths_of
from xlstm_distill.evaluate import heldout
from xlstm_distill.evaluate.models import ModelPlace, load_model, load_tokenizer, model_places, precision_of, read_head
from xlstm_distill.evaluate.suites import Asked
from xlstm_distill.merge.linear import FLOATS
from xlstm_distill.merge.methods import as_tensor
from xlstm_distill.merge.write import Experts, Recipe
from xlstm_distill.runtime.stop import StopFlag

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Meter:
    """Measures one candidate after another in one student."""

    folder: JobFolder
    experts: Experts
    stop: StopFlag
    on_unit: Callable[[], None] = lambda: None
    """Called after each held-out batch and each task."""

    @cached_property
    def places(self) -> dict[str, ModelPlace]:
        return model_places(self.folder.path.parent, self.folder.config)

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Source → folder of its token shards."""
        from xlstm_distill.data.shards import source_folders

        return source_folders(self.folder)

    @cached_property
    def samples(self) -> dict[str, heldout.Sample]:
        """Source → the held-out sequences behind those that `eval` scores; the last ones where too few are left."""
        from xlstm_distill.data.shards import count_samples
        from xlstm_distill.data.stream import read_samples

        count, found = self.folder.config.eval.samples, {}
        for source, path in self.shards.items():
            first = max(0, min(count, count_samples(path / "validation") - count))
            if first < count:
                self.shared.append(source)
            batch = read_samples(path / "validation", count, first)
            found[source] = heldout.Sample(batch.tokens, batch.mask)
        return found

    @cached_property
    def shared(self) -> list[str]:
        """Sources with so few held-out sequences that `eval` scores some of the same."""
        return []

    @property
    def units(self) -> int:
        """Units of one candidate."""
        batch = self.folder.config.eval.batch
        batches = sum(-(-len(sample.tokens) // batch) for sample in self.samples.values())
        return batches + len(self.tasks)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """`merge.tasks` by their full names."""
        config = self.folder.config
        return expand(config.merge.tasks, tuple(config.sources), lengths_of(config))

    @cached_property
    def made_from(self) -> str:
        """Changes with whatever changes the numbers of a candidate."""
        config = self.folder.config
        asked = [Asked.of(config, task).settings for task in self.tasks]
        settings = [config.eval.samples, asked, config.data.shards, config.seed, precision_of(config)]
        return hash_value([self.folder.input_digests(), plain(settings), config.merge.density, config.merge.scale])

    def measure(self, recipe: Recipe) -> dict[str, Any]:
        """The numbers of one candidate.

        Returns:
            `kl` by source and their mean `mean_kl`, in nats per token; with tasks `scores` by task, and of those where
            more is better `score`, the mean, with `stderr`.
        """
        self._swap(recipe)
        head = self.student.get_output_embeddings().weight.detach()
        kl = {source: self._kl(source, head) for source in self.samples}
        return {"kl": kl, "mean_kl": fmean(kl.values()), **self._tasks()}

    @cached_property
    def student(self) -> "PreTrainedModel":
        """The student that the candidates are swapped into; the first expert's weights at the start."""
        place = replace(self.places["merged"], folder=self.experts.first.path)
        return load_model(place, self.folder.config.strategy.precision)

    def _swap(self, recipe: Recipe) -> None:
        held, entries = self.student.state_dict(), self.experts.first.entries  # shares the parameters' memory
        with torch.no_grad(), self.experts.reading(recipe):
            for name, raw in self.experts.merged(recipe, entries):
                if entries[name].dtype in FLOATS:  # the experts agree on anything else
                    held[name].copy_(as_tensor(raw, entries[name].dtype).view(held[name].shape))
                self.stop.check()

    def _kl(self, source: str, head: Any) -> float:
        sample = self.samples[source]
        hidden = self._hidden(self.student, source, self.on_unit)
        reference = heldout.Reference(self._teacher(source), self._teacher_head.to(head))
        return float(heldout.measure(hidden, head, sample, reference)["kl"])

    def _hidden(self, model: "PreTrainedModel", source: str, on_batch: Callable[[], None]) -> Any:
        return heldout.final_hidden(model, self.samples[source].tokens[:, :-1], self.folder.config.eval.batch, on_batch)

    def prepare(self) -> None:
        """Run the teacher, whose hidden states are kept on disk, before a student is in memory."""
        teacher = None
        for source in self.samples:
            if heldout.load_hidden(self._path(source), self.made_from) is None:
                teacher = teacher or load_model(self.places["teacher"], self.folder.config.strategy.precision)
                hidden = self._hidden(teacher, source, self.stop.check)
                heldout.save_hidden(self._path(source), hidden, self.made_from)

    def clear(self) -> None:
        """Remove what `prepare` kept."""
        for source in self.samples:
            self._path(source).unlink(missing_ok=True)

    def _path(self, source: str) -> Path:
        return self.folder.checkpoints / f"hidden-{source}.safetensors"

    def _teacher(self, source: str) -> Any:
        hidden = heldout.load_hidden(self._path(source), self.made_from)
        assert hidden is not None
        return hidden

    @cached_property
    def _teacher_head(self) -> Any:
        return read_head(self.places["teacher"])

    def _tasks(self) -> dict[str, Any]:
        if not self.tasks:
            return {}
        from xlstm_distill.evaluate.lm import evaluate

        config, scores = self.folder.config, dict[str, Any]()
        for task in self.tasks:
            asked = Asked.of(config, task)
            scores[task] = evaluate(self.student, self._tokenizer, asked, self._local_tasks, config.eval.batch).score
            self.on_unit()
        counted = [scores[task] for task in self.tasks if scores[task]["higher_is_better"]]
        if not counted:
            return {"scores": scores}
        stderr = sum((score["stderr"] or 0.0) ** 2 for score in counted) ** 0.5 / len(counted)
        return {"scores": scores, "score": fmean(score["score"] for score in counted), "stderr": stderr}

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.places["teacher"])

    @cached_property
    def _local_tasks(self) -> Path:
        from xlstm_distill.evaluate.tasks.publish import publish

        config = self.folder.config
        return publish(
            self.folder.checkpoints / "tasks",
            self.tasks,
            self._tokenizer,
            self.shards,
            window=config.student.window,
            sequence=config.data.sequence,
            seed=config.seed,
            key=self.made_from,
            lengths=lengths_of(config),
        )
