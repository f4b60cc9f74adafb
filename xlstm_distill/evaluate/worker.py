"""One rank's copy of a model, and what it answers: lm-eval's requests, held-out text, perplexity by position.

The teacher's final hidden states on the held-out text are kept, so that it runs once for all models:
`output/.hidden/SOURCE-ROW.safetensors`, which belong to no model's results.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xlstm_distill.contract.files import hash_value
from xlstm_distill.contract.job import JobFolder, plain
from xlstm_distill.contract.tasks import lengths_of
from xlstm_distill.evaluate import heldout, position
from xlstm_distill.evaluate.heldout import Losses, Sample
from xlstm_distill.evaluate.lm import KINDS, shared_lm
from xlstm_distill.evaluate.models import (
    ModelPlace,
    load_model,
    load_tokenizer,
    model_places,
    precision_of,
    read_head,
)
from xlstm_distill.evaluate.team import Handler, Team

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = tuple[str, int]
"""Source and number of a held-out sequence."""


class Worker:
    """What this rank holds; its handlers of the team's rounds.

    Args:
        folder: of the job.
        team: the ranks.
    """

    def __init__(self, folder: JobFolder, team: Team) -> None:
        self.folder, self.config, self.team = folder, folder.config, team
        self.name = ""
        """Of the model that is loaded."""
        self.model: PreTrainedModel
        self.lm: Any = None
        """lm-eval's model over it."""
        self._long: dict[str, Sample] = {}
        handlers: dict[str, Handler] = {
            "load": self.load,
            "lm": self.make_lm,
            "hidden": self.hidden,
            "heldout": self.heldout,
        }
        team.handlers |= {**handlers, "positions": self.positions}

    @cached_property
    def places(self) -> dict[str, ModelPlace]:
        return model_places(self.folder.path.parent, self.config)

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Source → folder of its token shards."""
        from xlstm_distill.data.shards import source_folders

        return source_folders(self.folder)

    @cached_property
    def samples(self) -> dict[str, Sample]:
        """Source → its held-out sequences."""
        from xlstm_distill.data.stream import read_samples

        count = self.config.eval.samples
        batches = {source: read_samples(path / "validation", count) for source, path in self.shards.items()}
        return {source: Sample(batch.tokens, batch.mask) for source, batch in batches.items()}

    def long(self, source: str) -> Sample:
        """Held-out sequences as long as the longest of `eval.lengths`."""
        if source not in self._long:
            length, sequence = max(lengths_of(self.config)), self.config.data.sequence
            count = max(1, self.config.eval.samples * sequence // max(length, sequence))
            self._long = {source: position.read_long(self.shards[source], length, count)}
        return self._long[source]

    @cached_property
    def data_key(self) -> Any:
        """What shards and teacher are made from."""
        digests = self.folder.input_digests()
        made_from = {name: digest for name, digest in digests.items() if name in ("fetch", "tokenize")}
        return [made_from, plain(self.config.data.shards)]

    def load(self, names: list[str]) -> list[None]:
        """Take another model in place of the one there was."""
        (name,) = names
        if name != self.name:
            self.name, self.lm = "", None
            for held in (self.__dict__, self.team.handlers):  # whatever holds the model before
                for key in ("model", *KINDS):
                    held.pop(key, None)
            self.model, self.name = load_model(self.places[name], self.config.strategy.precision), name
        torch.manual_seed(self.config.seed + self.team.world.rank)  # answers that are drawn differ between ranks
        return [None]

    def make_lm(self, names: list[str]) -> list[None]:
        """lm-eval's model over the one that is loaded."""
        tokenizer = load_tokenizer(self.places[self.name])
        self.lm = shared_lm(self.team, self.model, tokenizer, self.config.eval.batch)
        return [None]

    def hidden(self, rows: list[Row]) -> list[None]:
        """Keep the final hidden states of the teacher, which is loaded, on these sequences."""
        self._hidden(rows)
        return [None for _ in rows]

    def heldout(self, rows: list[Row]) -> list[Losses]:
        """What the model loses on these sequences of one source, against the teacher's hidden states."""
        sample = self._sample(rows)
        hidden = self._hidden(rows)
        head = self.model.get_output_embeddings().weight.detach()
        reference = None
        if self.name != "teacher":
            kept = [heldout.load_hidden(self.hidden_path(row), self.hidden_key(row)) for row in rows]
            reference = heldout.Reference(
                torch.cat([part for part in kept if part is not None]), self.teacher_head.to(head)
            )
        lost = heldout.losses(hidden, head, sample, reference)
        return lost.by_sequence(sample.mask[:, 1:].sum(1).tolist())

    def _sample(self, rows: list[Row]) -> Sample:
        whole = self.samples[rows[0][0]]
        numbers = [number for _, number in rows]
        return Sample(whole.tokens[numbers], whole.mask[numbers])

    def _hidden(self, rows: list[Row]) -> torch.Tensor:
        hidden = heldout.final_hidden(self.model, self._sample(rows).tokens[:, :-1], len(rows))
        for row, part in zip(rows, hidden.split(1) if self.name == "teacher" else (), strict=False):
            heldout.save_hidden(self.hidden_path(row), part.clone(), self.hidden_key(row))
        return hidden

    def hidden_path(self, row: Row) -> Path:
        """Where the teacher's hidden states on a sequence are kept."""
        return self.folder.output / ".hidden" / f"{row[0]}-{row[1]:05d}.safetensors"

    def hidden_key(self, row: Row) -> str:
        """What they are made from."""
        return hash_value([self.data_key, *row, self.config.data.sequence, precision_of(self.config)])

    @cached_property
    def teacher_head(self) -> torch.Tensor:
        return read_head(self.places["teacher"])

    def positions(self, rows: list[Row]) -> list[Losses]:
        """What the model loses on these long sequences of one source."""
        whole, numbers = self.long(rows[0][0]), [number for _, number in rows]
        sample = Sample(whole.tokens[numbers], whole.mask[numbers])
        hidden = heldout.final_hidden(self.model, sample.tokens[:, :-1], len(rows))
        lost = heldout.losses(hidden, self.model.get_output_embeddings().weight.detach(), sample, None)
        return lost.by_sequence(sample.mask[:, 1:].sum(1).tolist())
