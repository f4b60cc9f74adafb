"""Bytes that each job writes into the run folder (formulas; the tokens of sources may be looked up)."""

import glob
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.activations import FLOAT32
from launcher.budget import drawn
from launcher.memory import STATE
from launcher.parameters import sizes
from xlstm_distill.contract.budget import is_bounded, text_for
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.schema import Config, Source, pieces_of

TEXT_BYTES = 4.2
"""Of a token as text in JSON lines, as `fetch` keeps it: 4.0 of Python's library, 4.2 of documentation (SmolLM2)."""
SAMPLE_BYTES = 4 + 1 + 4
"""Of a token in a shard: itself, whether it counts, its document."""
PACKED_BYTES = 1.5
"""Of the same under zstd: 1.1 and 1.3 of those texts; a larger vocabulary carries more. Readers unpack it beside."""
KEPT_BYTES = {32: 1.33, 64: 1.28, 256: 1.28}
"""By k, of a kept token in the targets: SmolLM2 on code, mathematics and prose (`benchmarks/codec.py`)."""
DRAWN = 1.11
"""Times as many where half of them are drawn (`benchmarks/targets.py`, k = 32)."""
HEADER_BYTES = 100
"""Of a sample's targets (`data.codec`), with the states of its coder."""
MODEL_BYTES = FLOAT32
"""Of a parameter: training writes float32."""
LOCAL = ("text", "jsonl", "parquet")


@dataclass(frozen=True)
class Disk:
    """Bytes in a job's folder."""

    shards: float = 0.0
    """Text and token shards."""
    targets: float = 0.0
    """Of the teacher, with the tokens beside them."""
    checkpoint: float = 0.0
    """One of them."""
    checkpoints: int = 0
    """That lie there at the same time, one that is being written included."""
    models: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.shards + self.targets + self.checkpoint * self.checkpoints + self.models


def disk_of(job: Job, config: Config, tokens: Mapping[str, float], steps: int) -> Disk:
    """What a job writes.

    Args:
        job: of the graph.
        config: of the run.
        tokens: of `tokens_of`.
        steps: of a training.
    """
    counts, teacher = sizes(config.teacher, config.student), config.teacher
    stored = FLOAT32 if teacher.gguf_file else 2  # bytes of a parameter in the teacher's own files
    student = MODEL_BYTES * counts.total
    if job.stage == "fetch":  # a teacher's own safetensors are linked, not copied
        sources = {} if config.data.shards else config.sources
        text = sum(_text_bytes(source, tokens[name]) for name, source in sources.items())
        return Disk(shards=text, models=FLOAT32 * counts.teacher if teacher.gguf_file else 0.0)
    if job.stage == "tokenize":
        return Disk(shards=(PACKED_BYTES + SAMPLE_BYTES) * sum(tokens[name] for name in config.sources))
    if job.stage == "cache":
        cached = sum(tokens[f"cached {name}"] for name in job.pieces)
        drawn = config.sampler != "topk"
        kept = target_bytes(config.cache.top_k, config.data.sequence, drawn=drawn)
        return Disk(targets=cached * (SAMPLE_BYTES + kept))
    if job.stage == "align" and not job.tokens:
        return Disk(models=stored * counts.total)
    if job.stage == "align":
        state = STATE * counts.aligned
        return Disk(checkpoint=state, checkpoints=_kept(job, config, steps), models=stored * counts.total + student)
    if job.stage == "distill":
        state = STATE * counts.trained
        return Disk(checkpoint=state, checkpoints=_kept(job, config, steps), models=student)
    return Disk(models=student if job.stage == "merge" else 0.0)


def _text_bytes(source: Source, tokens: float) -> float:
    """What `fetch` brings of a source; a character counts as a byte."""
    if source.kind in LOCAL:
        return 0.0
    return text_for(source.tokens) if source.kind == "hub" and is_bounded(source) else TEXT_BYTES * tokens


def target_bytes(top_k: int, sequence: int, *, drawn: bool = False) -> float:
    """Of a token's targets: k ids with their log-probabilities, and a share of the header. Between the k that were
    measured by the logarithm of k; `drawn`: half of them, or all."""
    known = sorted(KEPT_BYTES)
    low = max((k for k in known if k <= top_k), default=known[0])
    high = min((k for k in known if k >= top_k), default=known[-1])
    share = math.log(top_k / low) / math.log(high / low) if high > low else 0.0
    each = (KEPT_BYTES[low] * (1 - share) + KEPT_BYTES[high] * share) * (DRAWN if drawn else 1.0)
    return top_k * each + HEADER_BYTES / sequence


def _kept(job: Job, config: Config, steps: int) -> int:
    """Checkpoints at one time: the newest, those that stay, and one that is being written."""
    guard, every = config.guard, getattr(config, job.stage).checkpoint_every
    made = math.ceil(steps / every)
    return min(made, guard.keep + 1 + (steps // guard.keep_every if guard.keep_every else 0))


def tokens_of(config: Config, folder: Path) -> dict[str, float]:
    """Tokens by source, and under `cached PIECE` those that get targets.

    Of a source that is tokenised they are known. Before, they are its budget, and where it has none what the trainings
    draw from it; of local files no more than their bytes. It may hold more than is drawn, so plans say "at least".
    """
    found: dict[str, float] = {}
    limit = 2.0 * config.cache.max_samples * config.data.sequence or math.inf  # of both splits
    for name, source in config.sources.items():
        pieces = [folder / "jobs" / "tokenize" / "pieces" / f"{piece}.json" for piece in pieces_of(name, source)]
        known = None if config.data.shards else _tokenised(pieces)
        wanted = source.tokens if is_bounded(source) else drawn(config, name) * (1 + config.data.validation)
        found[name] = known if known is not None else min(wanted, _file_bytes(source))
        cached = pieces_of(name, source)
        found |= {f"cached {piece}": min(found[name], limit) / len(cached) for piece in cached}
    return found


def _tokenised(pieces: list[Path]) -> float | None:
    """Tokens of a finished source, by its pieces' manifests."""
    facts = [manifest.facts for piece in pieces if (manifest := read_manifest(piece))]
    if len(facts) < len(pieces):
        return None
    return float(sum(f.get(split, {}).get("tokens", 0) for f in facts for split in ("train", "validation")))


def _file_bytes(source: Source) -> float:
    """A token of text is some 4 bytes, of compressed Parquet some 1."""
    if source.kind not in LOCAL:
        return math.inf
    return float(sum(os.path.getsize(path) for path in glob.glob(source.path, recursive=True)))


def present(folder: Path) -> float:
    """Bytes in a job's folder."""
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return float(sum(file.lstat().st_size for file in files if not file.is_symlink()))
