"""The frozen teacher at work on one token shard after another.

The ranks share every batch: each runs the teacher on its rows and codes them, rank 0 collects the bytes and writes. One
rank is the plain case. What the teacher does next overlaps with the coding of what it did last.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Config
from xlstm_distill.data import codec, priors
from xlstm_distill.data.reader import Shards
from xlstm_distill.parallel.strategy import Strategy, make_strategy
from xlstm_distill.parallel.together import Stop, Together
from xlstm_distill.teacher.frozen import FrozenTeacher
from xlstm_distill.teacher.samplers import draws_of, sparse_targets, uniforms
from xlstm_distill.teacher.sink import Sink, failure
from xlstm_distill.teacher.units import Piece, Unit

PRIOR_POSITIONS = 1 << 15
"""Positions of a source's first shard that its prior is made from, whichever piece it is for."""
PENDING = 2
"""Batches that are coded while the teacher runs."""
Targets = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""ids [T, k], log-probabilities [T, k], log of the tail's mass [T]."""


class Capture:
    """The frozen teacher, alone on one GPU or spread over several ranks. Everything is collective.

    Args:
        teacher: HF folder.
        config: strategy (bfloat16 counts on GPUs only, a CPU computes in float32) and `cache`.
        world: this process among its ranks.
        folder: of the job.

    Raises:
        Mistake: k is above the teacher's vocabulary.
    """

    def __init__(self, teacher: Path, config: Config, world: World | None = None, folder: JobFolder | None = None):
        self.config, self.settings, self.world = config, config.cache, world or World()
        self.ranks = Together(self.world)
        half = config.strategy.precision == "bfloat16" and torch.cuda.is_available()
        alone = self.world.size == 1
        settings = replace(config.strategy, precision="bfloat16" if half else "float32")
        self.strategy: Strategy = make_strategy(
            replace(settings, name="single", shard="all", offload=False) if alone else settings, self.world, folder
        )
        # Alone it is kept rounded: half the memory. Sharded, as beside a student.
        dtype = torch.bfloat16 if half and alone else torch.float32
        self.teacher = FrozenTeacher(teacher, self.strategy, config.student.reset_at_documents, dtype)
        self.vocabulary = self.teacher.vocabulary
        if self.settings.top_k > self.vocabulary:
            raise Mistake(
                f"cache.top_k={self.settings.top_k}: above the teacher's vocabulary; expected 1 to {self.vocabulary}"
            )
        self.facts = {"vocab_size": self.vocabulary, "dtype": settings.precision}
        self.step = self.settings.micro_batch * self.world.size
        """Samples of a batch, over all ranks."""
        self.coders = ThreadPoolExecutor(max(1, min(8, torch.get_num_threads())), thread_name_prefix="coder")
        self._shards: dict[Path, Shards] = {}
        self._kept: dict[tuple[Path, int], list[Targets]] = {}

    def close(self) -> None:
        """Leave the process group."""
        self.coders.shutdown(cancel_futures=True)
        self.strategy.close()

    def piece(
        self,
        piece: Piece,
        units: Sequence[Unit],
        index: dict[str, Any],
        stop: Stop,
        on_batch: Callable[[int, float], None] = lambda samples, tokens_per_s: None,
    ) -> float:
        """Make the targets of `units`, those of the piece that are not finished; each is durable when it is.

        Args:
            piece: of a source.
            units: left to do.
            index: see `teacher.index`.
            stop: asked before every batch.
            on_batch: hears the samples of each batch that the teacher has seen, and its speed.

        Returns:
            Tokens per second.

        Raises:
            Mistake: a shard is missing or damaged, or its tokens are not the teacher's.
            OSError: the disk is full; on the other ranks a Mistake.
            Stopped: on request.
        """
        if not units:
            return 0.0
        began = time.monotonic()
        prior = self._prior(piece, units, index, stop, on_batch)
        for unit in units:
            with ExitStack() as stack:
                sink = Sink(stack, unit.folder, self.config.data) if self.world.rank == 0 else Sink()
                self._fill(unit, prior, index, stop, sink, on_batch)
                failed = failure(stack.pop_all().close)
            self.ranks.go_on(stop, failed)
        return sum(unit.count for unit in units) * self.config.data.sequence / (time.monotonic() - began)

    def _fill(
        self,
        unit: Unit,
        prior: codec.Prior,
        index: dict[str, Any],
        stop: Stop,
        sink: Sink,
        on_batch: Callable[[int, float], None],
    ) -> None:
        pending: deque[tuple[list[dict[str, Any]], list[Future[bytes]]]] = deque()
        for numbers in unit.batches(self.step):
            began = time.monotonic()
            samples, failed = self._read(unit, numbers)
            self.ranks.go_on(stop, failed or sink.failed)
            rows = kept = self._kept.pop((unit.tokens, numbers.start), None)
            if rows is None:  # not so on one rank alone: one without a row has an empty list
                rows = self._rows(unit, numbers, samples, stop)
            futures = [self.coders.submit(codec.encode, *row, self.vocabulary, prior) for row in rows]
            pending.append((samples, futures))
            if len(pending) > PENDING:
                self._write(sink, *pending.popleft())
            if kept is None:  # else it was told when the prior was made
                on_batch(len(numbers), self._speed(numbers, began))
        while pending:
            self._write(sink, *pending.popleft())
        sink.note(unit.note(index) | self.facts | {"prior": prior.digest})
        self.ranks.go_on(stop, sink.failed)

    def _speed(self, numbers: range, began: float) -> float:
        """Tokens per second of a batch."""
        return len(numbers) * self.config.data.sequence / (time.monotonic() - began)

    def _write(self, sink: Sink, samples: list[dict[str, Any]], futures: list[Future[bytes]]) -> None:
        coded = self.ranks.gather([future.result() for future in futures])
        for sample, targets in zip(samples, coded, strict=self.world.rank == 0):
            sink.write(sample, targets)

    def _mine(self, numbers: range) -> range:
        """This rank's samples of a batch; of the last one there may be none."""
        size = self.settings.micro_batch
        return numbers[self.world.rank * size : (self.world.rank + 1) * size]

    def _read(self, unit: Unit, numbers: range) -> tuple[list[dict[str, Any]], Exception | None]:
        """Samples of a batch, on rank 0 all; elsewhere this rank's, or the first: every rank runs every forward, or
        the others would wait for it. What went wrong, which may be on one rank only."""
        wanted = numbers if self.world.rank == 0 else self._mine(numbers) or numbers[:1]
        try:
            if unit.tokens not in self._shards:
                self._shards = {unit.tokens: Shards(unit.tokens)}
            samples = [self._shards[unit.tokens][n] for n in wanted]
            for tokens in (sample["tokens"] for sample in samples):
                if int(tokens.max()) >= self.vocabulary or int(tokens.min()) < 0:
                    raise Mistake(
                        f"{unit.tokens}: token {int(tokens.max())} is outside the teacher's vocabulary of "
                        f"{self.vocabulary}; the shards were made with another tokenizer"
                    )
        except (Mistake, OSError) as error:
            return [], error
        return samples, None

    def _rows(self, unit: Unit, numbers: range, samples: list[dict[str, Any]], stop: Stop) -> list[Targets]:
        """Targets of this rank's samples of a batch."""
        mine = self._mine(numbers)
        used = samples[: len(mine) or 1]
        tokens, documents = (
            torch.from_numpy(np.stack([s[name] for s in used]).astype(np.int64)) for name in ("tokens", "document")
        )
        count, length = tokens.shape[0], tokens.shape[1] - 1
        draws = draws_of(self.config.sampler, self.settings.top_k)
        key = (self.config.seed, unit.source, unit.split)
        drawn = [uniforms(length, draws, *key, number) for number in (mine or numbers[:1])] if draws else []
        found = self.targets(tokens, documents, torch.cat(drawn) if drawn else None)
        ids, log_probs, tail = (t.cpu().numpy().reshape(count, length, *t.shape[1:]) for t in found)
        rows = list(zip(ids, log_probs, tail, strict=True))[: len(mine)]
        self.ranks.go_on(stop, _not_numbers(unit, mine, rows))
        return rows

    def targets(self, tokens: Tensor, documents: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sparse targets at the positions 0 … T − 1 of `tokens` [B, T + 1]: ids int32 [B·T, k], log-probabilities
        [B·T, k], log of the tail's mass [B·T]. With `student.reset_at_documents` the `documents` [B, T + 1] are seen
        apart. `draws`: see `sparse_targets`."""
        settings = self.settings

        def take(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            ids, log_probs, tail = sparse_targets(
                hidden, weight, settings.top_k, settings.chunk,
                sampler=self.config.sampler, draws=draws, soft_cap=self.teacher.soft_cap,
            )  # fmt: skip
            return ids.int(), log_probs, tail

        return self.teacher(tokens[:, :-1], documents[:, :-1], take)

    def _prior(
        self,
        piece: Piece,
        units: Sequence[Unit],
        index: dict[str, Any],
        stop: Stop,
        on_batch: Callable[[int, float], None],
    ) -> codec.Prior:
        """The prior of what is finished of the piece, or one made from the first shard of the source: the same for all
        of its pieces, up to rounding. Targets that are found on the way are kept for their shard."""
        notes = (unit.done(index) for unit in piece.units)
        found = next((note["prior"] for note in notes if note), "") if self.world.rank == 0 else ""
        if digest := self.ranks.from_first(found):
            return priors.read_prior(piece.folder, digest)
        first, kept = piece.all_units("train")[0], {}
        for numbers in _spread(first.batches(self.step), PRIOR_POSITIONS // (self.step * self.config.data.sequence)):
            began = time.monotonic()
            samples, failed = self._read(first, numbers)
            self.ranks.go_on(stop, failed)
            kept[first.tokens, numbers.start] = self._rows(first, numbers, samples, stop)
            on_batch(len(numbers) if first in units else 0, self._speed(numbers, began))
        gathered = self.ranks.gather([row for rows in kept.values() for row in rows])
        data = self.ranks.from_first(codec.Prior.fit(gathered, self.vocabulary).to_bytes() if gathered else b"")
        prior = codec.Prior.from_bytes(data)
        failed = failure(lambda: priors.write_prior(piece.folder, prior)) if self.world.rank == 0 else None
        self.ranks.go_on(stop, failed)
        self._kept = kept if first in units else {}
        return prior


def _not_numbers(unit: Unit, numbers: range, rows: list[Targets]) -> Mistake | None:
    """What to say of a teacher that gives NaN."""
    for number, (_, log_probs, tail) in zip(numbers, rows, strict=True):
        if np.isnan(log_probs).any() or np.isnan(tail).any():
            return Mistake(
                f"{unit.tokens}: sample {number}: the teacher's logits are not numbers; look at its weights, or "
                "compute them with strategy.precision=float32"
            )
    return None


def _spread(batches: list[range], count: int) -> list[range]:
    """About `count` of them, evenly, at least one."""
    return batches[:: max(1, -(-len(batches) // max(1, count)))]
