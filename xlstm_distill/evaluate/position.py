"""Perplexity by position: held-out text as sequences longer than those of the training, and what each position costs.

`local_positions_SOURCE` on one model. Its result has, beside lm-eval's keys, `positions`: `{"edges", "ce", "tokens"}`,
the mean cross-entropy in nats of the labels whose position in the sequence is in `[edges[i], edges[i + 1])`, and their
number. Buckets double in width, as what a window forgets shows at its multiples.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.evaluate.heldout import Losses, Sample

FIRST_EDGE = 32
"""End of the first bucket."""


def read_long(source: Path, length: int, count: int) -> Sample:
    """Held-out sequences of one source, samples joined: each begins with the token that the one before it ends with.

    Args:
        source: folder of one source in the token shards, which holds `validation/`.
        length: T of the sequences.
        count: sequences, at most.

    Raises:
        Mistake: the held-out text has fewer tokens than one sequence.
    """
    from xlstm_distill.data.stream import read_samples

    batch = read_samples(source / "validation", 1)
    per_sequence = -(-length // (batch.tokens.shape[1] - 1))
    batch = read_samples(source / "validation", per_sequence * count)
    whole = len(batch.tokens) // per_sequence
    if not whole:
        held = len(batch.tokens) * (batch.tokens.shape[1] - 1)
        raise Mistake(f"eval.lengths: {length}: the held-out text in {source} has {held} tokens only")
    tokens, mask = (
        torch.cat(
            [
                column[: whole * per_sequence, :-1].reshape(whole, -1),
                column[per_sequence - 1 :: per_sequence, -1:][:whole],
            ],
            1,
        )
        for column in (batch.tokens, batch.mask)
    )
    return Sample(tokens[:, : length + 1], mask[:, : length + 1])


def edges_of(length: int) -> list[int]:
    """Where the buckets of sequences of `length` begin, and where the last one ends."""
    found = [0]
    while found[-1] < length:
        found.append(min(length, max(FIRST_EDGE, 2 * found[-1])))
    return found


def position_results(task: str, rows: Sequence[Losses], length: int) -> dict[str, Any]:
    """What a model lost on sequences of `length`, in the form of lm-eval's results."""
    lost, edges = Losses.joined(rows), edges_of(length)
    bucket = torch.bucketize(lost.positions, torch.tensor(edges[1:]), right=True)
    tokens = torch.bincount(bucket, minlength=len(edges) - 1)
    sums = torch.bincount(bucket, weights=lost.ce.double(), minlength=len(edges) - 1)
    means = [(total / n).item() if n else None for total, n in zip(sums, tokens, strict=True)]
    return {
        "results": {
            task: {
                "alias": task,
                "sample_len": len(rows),
                "perplexity,none": math.exp(min(lost.ce.double().mean().item(), 700.0)),
                "perplexity_stderr,none": "N/A",
            }
        },
        "higher_is_better": {task: {"perplexity": False}},
        "n-samples": {task: {"original": len(rows), "effective": len(rows)}},
        "positions": {"edges": edges, "ce": means, "tokens": tokens.tolist()},
    }


def position_samples(rows: Sequence[Losses]) -> list[dict[str, Any]]:
    """One line per sequence: its mean cross-entropy in nats."""
    return [{"id": str(number), "score": row.ce.double().mean().item()} for number, row in enumerate(rows)]
