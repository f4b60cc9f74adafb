"""What the student learns from: the teacher's distribution over the next token, whole or sparse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.schema import Config, Distill
from xlstm_distill.data.stream import Batch
from xlstm_distill.model.layout import make_layout
from xlstm_distill.objectives.distill import DenseTargets, SparseTargets, Targets
from xlstm_distill.parallel.load import empty_model
from xlstm_distill.parallel.strategy import Strategy

TargetSource = Callable[[Batch], Targets]
"""A micro-batch of B sequences of T + 1 tokens → the teacher at its B·T positions."""


def make_target_source(
    config: Config, folder: JobFolder, strategy: Strategy, shards: Path, sources: list[str]
) -> TargetSource:
    """Where distillation gets its targets: from the shards, or from the teacher beside the student.

    Raises:
        Mistake: the cached targets are not this teacher's, or have another top-k.
    """
    if config.distill.targets == "online":
        teacher, reset = folder.input("fetch") / "teacher", config.student.reset_at_documents
        return OnlineTargets(teacher, config.distill, config.cache.top_k, strategy, split=reset)
    from xlstm_distill.data.shards import check_targets

    for source in sources:
        for split in ("train", "validation"):
            check_targets(shards / source / split, expected_index(folder.input("fetch"), config.cache.top_k))
    return cached_targets


def cached_targets(batch: Batch) -> SparseTargets:
    """The targets that came with the tokens."""
    if batch.targets is None:
        raise Mistake("the shards hold no teacher targets; run stage=cache, or set distill.targets=online")
    ids, log_probs, tail = batch.targets
    return SparseTargets(ids.flatten(0, 1), log_probs.flatten(0, 1), tail.flatten())


class OnlineTargets:
    """The frozen teacher, spread like the student; `split`: it sees the documents of a sample apart."""

    def __init__(self, teacher: Path, settings: Distill, top_k: int, strategy: Strategy, split: bool = False) -> None:
        self.settings, self.top_k, self.strategy, self.split = settings, top_k, strategy, split
        self.model = empty_teacher(teacher)
        strategy.prepare(self.model, teacher)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Targets:
        """Run the teacher on the batch."""
        found: list[Targets] = []

        def take(module: Any, inputs: tuple[Tensor, ...]) -> None:
            hidden, weight = inputs[0].flatten(0, 1), module.weight
            if self.settings.loss == "full":
                found.append(DenseTargets(hidden, weight.clone() if self.strategy.world.size > 1 else weight.detach()))
            else:
                found.append(SparseTargets(*sparse_targets(hidden, weight, self.top_k, chunk=512)))

        # Inside the head, because only there a sharded head is whole; one position of logits is all it computes.
        handle = self.model.lm_head.register_forward_pre_hook(_keep_last(take))
        try:
            with self.strategy.autocast():
                tokens, documents = (x[:, :-1].to(self.strategy.device) for x in (batch.tokens, batch.document))
                self.model(input_ids=tokens, position_ids=document_positions(documents, self.split), use_cache=False)
        finally:
            handle.remove()
        return found[0]


def document_positions(document: Tensor, split: bool) -> Tensor | None:
    """Positions [B, T] that start again with each document: from these a transformer knows not to look across.

    Args:
        document: [B, T], numbers that change where the next document starts.
        split: False: one row is one sequence, whatever it holds; then None.
    """
    if not split:
        return None
    layout = make_layout(None, document, document.shape[1])
    assert layout is not None
    return layout.ordinal


def _keep_last(take: Callable[[Any, tuple[Tensor, ...]], None]) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor]]:
    """A forward pre-hook that hands the head's input to `take` and leaves the head one position to compute."""

    def hook(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        take(module, inputs)
        return (inputs[0][:, -1:],)

    return hook


def load_teacher(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The frozen teacher in `folder`, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def empty_teacher(folder: Path) -> Any:
    """The same in float32, its weights still to be read (`Strategy.prepare`)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = empty_model(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    return model.eval().requires_grad_(False)


def expected_index(fetched: Path, top_k: int) -> dict[str, Any]:
    """What the targets of this run's teacher must say of themselves."""
    import json

    sidecar = json.loads((fetched / "teacher.json").read_text(encoding="utf-8"))
    return {"teacher": sidecar["weights"], "tokenizer": sidecar["tokenizer"], "top_k": top_k}


def sparse_targets(hidden: Tensor, head_weight: Tensor, top_k: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k log-probabilities at temperature 1 and the mass of all other tokens.

    The logits of `chunk` positions exist at one time, never all. The tail is summed itself: 1 − Σ of the top would be
    zero in float32 where the tail is small.

    Args:
        hidden: [N, H], the teacher's last hidden states after the final norm.
        head_weight: [V, H].
        top_k: k, at most V.
        chunk: positions per product with the head.

    Returns:
        ids int64 [N, k] in order of falling probability, log-probabilities float32 [N, k], log of the tail's mass
        float32 [N] (−inf when k = V).
    """
    parts = [_sparse_chunk(rows @ head_weight.T, top_k) for rows in hidden.split(chunk)]
    ids, log_probs, tail = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(log_probs), torch.cat(tail)


def _sparse_chunk(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.float()
    top, ids = logits.topk(top_k, dim=-1)
    rest = (
        logits.scatter(1, ids, -torch.inf).logsumexp(-1)
        if top_k < logits.shape[1]
        else top.new_full((len(top),), -torch.inf)
    )
    normaliser = torch.logaddexp(top.logsumexp(-1), rest)
    return ids, top - normaliser[:, None], rest - normaliser
