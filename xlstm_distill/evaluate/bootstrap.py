"""Percentile bootstrap (Efron), vectorised over replicates and seeded.

**Over samples**: the items of each task are drawn anew with replacement, the same ones for every model that was asked
the same items (equal ids), so that differences between models are paired. Where a score has no samples it is drawn from
a normal distribution with its standard error, independently for each model; where it has neither it stays as it is.
**Over tasks**: the tasks are drawn anew with replacement, the same ones for every student; scores stay as they are.

Every draw depends on the task and on the items alone, so that an interval does not move when a student comes beside.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.evaluate.board import Score

REPLICATES = 1000
TAILS = (0.025, 0.975)
SEED = 0
BLOCK = 1 << 18
"""Items drawn at one time, which bounds the memory."""

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def interval(replicates: Floats) -> Interval | None:
    """Between the percentiles of a statistic's replicates [R]; ones that are not defined (NaN) are left out."""
    known = replicates[~np.isnan(replicates)]
    if not len(known):
        return None
    # An order statistic, not a mean of two: replicates of α* may be infinite.
    low, high = np.quantile(known, TAILS, method="inverted_cdf")
    return Interval(float(low), float(high))


def draw_tasks(count: int, replicates: int = REPLICATES) -> NDArray[np.int64]:
    """Indices of tasks [R, count]."""
    return np.random.default_rng(SEED).integers(0, count, (replicates, count))


def draw_scores(task: str, scores: Mapping[str, Score], replicates: int = REPLICATES) -> dict[str, Floats]:
    """Replicates [R] of each model's score on a task, over samples.

    Args:
        task: its name.
        scores: by model; those that are not usable get NaN.
        replicates: R.
    """
    found: dict[str, Floats] = {}
    for models in _same_items(scores):
        samples = scores[models[0]].samples
        ids = sorted(samples)
        rng = np.random.default_rng([SEED, crc32(task.encode()), crc32("\n".join(ids).encode())])
        values = np.array([[scores[model].samples[id] for id in ids] for model in models])
        found |= dict(zip(models, draw_means(values, rng, replicates), strict=True))
    for model, score in scores.items():
        if model not in found:
            rng = np.random.default_rng([SEED, crc32(task.encode()), crc32(model.encode())])
            found[model] = _normal(score, rng, replicates)
    return found


def draw_means(values: Floats, rng: np.random.Generator, replicates: int) -> Floats:
    """Means [M, R] over items drawn with replacement from `values` [M, n]; one draw serves all M rows."""
    rows, count = values.shape
    means = np.empty((rows, replicates))
    step = max(1, BLOCK // count)
    for start in range(0, replicates, step):
        chosen = rng.integers(0, count, (min(step, replicates - start), count))
        for row in range(rows):
            means[row, start : start + step] = values[row, chosen].mean(axis=-1)
    return means


def _same_items(scores: Mapping[str, Score]) -> list[list[str]]:
    """Models with samples, those with equal ids together."""
    groups: dict[frozenset[str], list[str]] = {}
    for model, score in scores.items():
        if score.usable and score.samples:
            groups.setdefault(frozenset(score.samples), []).append(model)
    return list(groups.values())


def _normal(score: Score, rng: np.random.Generator, replicates: int) -> Floats:
    if not score.usable:
        return np.full(replicates, math.nan)
    return np.maximum(0.0, score.value + (score.stderr or 0.0) * rng.standard_normal(replicates))


def spread(scores: Sequence[Score]) -> str:
    """How the spread of a task is known: `paired` samples, `unpaired` ones, a `normal` approximation for at least one
    model, or for at least one `none`. Scores that are not usable do not count."""
    usable = [score for score in scores if score.usable]
    if any(not score.samples and score.stderr is None for score in usable):
        return "none"
    if any(not score.samples for score in usable):
        return "normal"
    return "paired" if len({frozenset(score.samples) for score in usable}) <= 1 else "unpaired"
