"""What the student learns from: the teacher's distribution over the next token, whole or sparse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.schema import SAMPLERS, Config, Distill
from xlstm_distill.data.shards import token_folder
from xlstm_distill.data.stream import Batch
from xlstm_distill.objectives.distill import DenseTargets, SparseTargets, Targets
from xlstm_distill.parallel.strategy import Strategy
from xlstm_distill.teacher.frozen import FrozenTeacher
from xlstm_distill.teacher.index import check_targets, data_digest, index_of
from xlstm_distill.teacher.samplers import sparse_targets

TargetSource = Callable[[Batch], Targets]
"""A micro-batch of B sequences of T + 1 tokens → the teacher at its B·T positions."""
ONLINE_ONLY = (
    "distill.targets=cached: student=distil_xlstm learns from the teacher's hidden states at a falling temperature, "
    "which no cache holds; use distill.targets=online"
)


def make_target_source(
    config: Config, folder: JobFolder, strategy: Strategy, shards: Path, sources: list[str]
) -> TargetSource:
    """Where distillation gets its targets: from the shards, or from the teacher beside the student.

    Raises:
        Mistake: the cached targets are not this run's, or not those that the loss reads.
    """
    distill = replace(config.distill, loss=config.loss)
    if distill.targets == "online":
        teacher, reset = folder.input("fetch") / "teacher", config.student.reset_at_documents
        mean = config.student.kind == "distil_xlstm"
        return OnlineTargets(teacher, distill, config.cache.top_k, strategy, split=reset, layers_mean=mean)
    if config.student.kind == "distil_xlstm":
        raise Mistake(ONLINE_ONLY)
    if distill.temperature != 1 and distill.loss != "topk":
        raise Mistake(
            f"distill.temperature={distill.temperature}: the mass that cached targets leave out is known at 1 only; "
            "use distill.temperature=1, distill.loss=topk, or distill.targets=online"
        )
    if config.sampler not in SAMPLERS[config.loss]:
        raise Mistake(
            f"distill.loss={config.loss}: reads targets of cache.sampler={' or '.join(SAMPLERS[config.loss])}, "
            f"got {config.sampler}"
        )
    check_sources(config, folder, shards, sources)
    return cached_targets


def check_sources(config: Config, folder: JobFolder, shards: Path, sources: list[str]) -> None:
    """Refuse cached targets that are not the run's, with what differs.

    Raises:
        Mistake: it does; the line shows both values.
    """
    expected = index_of(config, folder.input("fetch"))
    tokens = token_folder(folder)
    for source in sources:
        for split in ("train", "validation"):
            check_targets(shards / source / split, expected)
            # They hold the tokens too: the shards that they were made from may be gone.
            if (tokens / source / split / "index.json").is_file():
                check_targets(shards / source / split, {"data": data_digest(tokens / source / split)})


def cached_targets(batch: Batch) -> SparseTargets:
    """The targets that came with the tokens."""
    if batch.targets is None:
        raise Mistake("the shards hold no teacher targets; run stage=cache, or set distill.targets=online")
    ids, log_probs, tail = batch.targets
    return SparseTargets(ids.flatten(0, 1), log_probs.flatten(0, 1), tail.flatten())


class OnlineTargets:
    """The frozen teacher, spread like the student; `split`: it sees the documents of a sample apart; `layers_mean`:
    dense targets hold the mean of its layers besides."""

    def __init__(
        self,
        teacher: Path,
        settings: Distill,
        top_k: int,
        strategy: Strategy,
        split: bool = False,
        layers_mean: bool = False,
    ) -> None:
        self.settings, self.top_k, self.strategy = settings, top_k, strategy
        self.teacher = FrozenTeacher(teacher, strategy, split, layers_mean=layers_mean)

    def __call__(self, batch: Batch) -> Targets:
        """Run the teacher on the batch. Collective."""
        return self.teacher(batch.tokens[:, :-1], batch.document[:, :-1], self._take)

    def _take(self, hidden: Tensor, weight: Tensor) -> Targets:
        heat, soft_cap = self.settings.temperature, self.teacher.soft_cap
        if self.settings.loss == "full":
            head = weight.clone() if self.strategy.world.size > 1 else weight.detach()
            mean = self.teacher.layers_mean
            return DenseTargets(hidden, head, soft_cap, None if mean is None else mean.flatten(0, 1))
        found = sparse_targets(hidden, weight, self.top_k, chunk=512, soft_cap=soft_cap, temperature=heat)
        return SparseTargets(*found, heat)
