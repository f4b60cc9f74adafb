"""Does caching the teacher's targets pay? Disk and rank-hours of every choice, the online teacher among them (pure).

Caching runs the teacher once over every token that is cached; online it runs over every token that a training draws: in
each epoch, and for each expert that has the source. Both are the same forward, so caching takes fewer hours from one
pass over the cached tokens on, at equal speeds; what it costs besides is the disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.checks import ranks_of
from launcher.disk import SAMPLE_BYTES, target_bytes, tokens_of
from launcher.estimate import speed
from launcher.plan import Graph, all_jobs
from xlstm_distill.contract.flops import step_flops
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.schema import Config, Placement, pieces_of

KEPT = (32, 64, 256)
"""k that are always shown, beside the run's own."""


@dataclass(frozen=True)
class Choice:
    """One way to get the targets."""

    name: str
    """`k=32`, or `online`."""
    chosen: bool
    """Whether it is the run's."""
    bytes_per_token: float
    """Of the targets."""
    disk: float
    """Bytes of the cache, tokens included."""
    capture: float
    """Rank-hours of the cache job."""
    rank_hours: float
    """Of capture and trainings together."""


@dataclass(frozen=True)
class Caching:
    """All ways, and how often the cached tokens are drawn."""

    choices: tuple[Choice, ...]
    cached: float
    """Tokens that are cached."""
    passes: float
    """Tokens that the trainings draw, per cached one."""
    break_even: float
    """Passes from which on caching takes fewer rank-hours than the online teacher."""


def choices_of(graph: Graph, config: Config, folder: Path) -> Caching | None:
    """`caching` of a plan that caches or distils."""
    concerned = any(job.stage in ("cache", "distill") for job in graph)
    return caching(config, tokens_of(config, folder)) if concerned else None


def caching(config: Config, tokens: Mapping[str, float]) -> Caching | None:
    """What the choices of `distill.targets` and `cache.top_k` cost; None for a run that distils nothing, or
    whose student learns from no cache.

    Args:
        config: settled.
        tokens: of `launcher.disk.tokens_of`.
    """
    trainings = [job for job in all_jobs(config) if job.stage == "distill"]
    pieces = [piece for name, source in config.sources.items() for piece in pieces_of(name, source)]
    cached = sum(tokens[f"cached {piece}"] for piece in pieces)
    if not trainings or not cached or not config.teacher.vocab_size or config.student.kind != "hybrid":
        return None
    place = config.cluster.stages.get("cache", Placement())
    capture = Job("cache", "cache", {}, placement=place)
    flops = step_flops("distill", config.teacher, config.student, config.data.sequence, online=True)
    drawn = float(sum(job.tokens for job in trainings))
    per_rank, per_trained = (speed(job, config) / ranks_of(job.placement) for job in (capture, trainings[0]))
    once, each = flops.teacher / per_rank / 3600, flops.teacher / per_trained / 3600  # rank-hours per token
    student = drawn * (flops.total - flops.teacher) / per_trained / 3600
    cached_already = config.distill.targets == "cached"
    kept = sorted({*KEPT, config.cache.top_k} if cached_already else KEPT)
    as_cached = replace(config, distill=replace(config.distill, targets="cached"))
    drawn_ids = as_cached.sampler != "topk"
    sizes = {top_k: target_bytes(top_k, config.data.sequence, drawn=drawn_ids) for top_k in kept}
    choices = [
        Choice(
            name=f"k={top_k}",
            chosen=cached_already and top_k == config.cache.top_k,
            bytes_per_token=size,
            disk=cached * (SAMPLE_BYTES + size),
            capture=cached * once,
            rank_hours=cached * once + student,
        )
        for top_k, size in sizes.items()
        if top_k <= config.teacher.vocab_size
    ]
    online = Choice("online", not cached_already, 0.0, 0.0, 0.0, drawn * each + student)
    return Caching((*choices, online), cached, drawn / cached, once / each)
