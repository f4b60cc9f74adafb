"""Reading of cached targets, from shards to batches of tensors, beside the codec's own decoding in the same run.

    python benchmarks/loader.py [--top-k 32] [--threads N] [--json]

Targets like a teacher's (a random walk over Zipf-like rows, V = 49,152) are written as `xdl` writes them: MDS shards,
a prior, samples of T tokens. In turn, round by round:

    decode   `codec.decode` of samples in memory, one after another, on one thread: what there is to do at least
    reader   `SampleStream`: read, check, decode, collate, with its threads ahead, as fast as somebody takes batches
    step     the same beside a step that takes as long as decoding a batch does: the wait that is left per batch

Speeds are medians over the rounds of tokens per second of wall-clock time; `ratio` is the median of reader ÷ decode.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xlstm_distill.data import codec, priors
from xlstm_distill.data.reader import Shards
from xlstm_distill.data.shards import sample, shard_writer
from xlstm_distill.data.stream import Part, SampleStream

VOCABULARY, SEQUENCE, SAMPLES, BATCH = 49_152, 4096, 48, 4
Targets = tuple[np.ndarray, np.ndarray, np.ndarray]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it comes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(write_shards(Path(folder), options.top_k), options.rounds)
    print(json.dumps({"top_k": options.top_k, **found}, indent=None if options.json else 2))


def write_shards(folder: Path, top_k: int) -> Path:
    """A source with one split."""
    rng = np.random.default_rng(0)
    rows = [targets(rng, top_k) for _ in range(SAMPLES)]
    prior = codec.Prior.fit(rows[:8], VOCABULARY)
    priors.write_prior(folder, prior)
    with shard_writer(folder / "train", SEQUENCE, 1 << 24, targets=True) as writer:
        for number, row in enumerate(rows):
            tokens = rng.integers(0, VOCABULARY, SEQUENCE + 1)
            columns = sample(tokens, np.ones(SEQUENCE + 1), np.full(SEQUENCE + 1, number))
            writer.write({**columns, "targets": codec.encode(*row, VOCABULARY, prior)})
    return folder / "train"


def targets(rng: np.random.Generator, top_k: int) -> Targets:
    """Rows that resemble earlier ones in part, with probabilities that fall like a teacher's."""
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    pool = rng.choice(VOCABULARY, (256, 2 * top_k), p=frequency / frequency.sum())
    ids = np.empty((SEQUENCE, top_k), np.int64)
    for t in range(SEQUENCE):
        found = np.unique(np.concatenate([pool[rng.integers(256)], rng.integers(0, VOCABULARY, top_k)]))
        ids[t] = rng.permutation(found)[:top_k]
    slope = rng.gamma(2.0, 0.6, (SEQUENCE, 1))
    logits = -slope * np.log(np.arange(1, top_k + 1)) * 2 + 0.3 * rng.standard_normal((SEQUENCE, top_k))
    logits = -np.sort(-logits, axis=1)
    tail = np.log(0.02 + 0.1 * rng.random(SEQUENCE))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + np.log1p(-np.exp(tail))[:, None]
    return ids, log_probs, tail


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Tokens per second of each way, and what is left of the wait beside a step."""
    shards = Shards(folder)
    coded = [shards[n]["targets"] for n in range(SAMPLES)]
    prior = priors.prior_for(coded[0], folder.parent)
    stream = SampleStream([Part(folder, 1.0)], batch=BATCH, seed=0)
    batches = SAMPLES // BATCH
    jobs: dict[str, Callable[[], Any]] = {
        "decode": lambda: [codec.decode(data, prior) for data in coded],
        "reader": lambda: [next(stream) for _ in range(batches)],
    }
    speeds: dict[str, list[float]] = {name: [] for name in jobs}
    waits, steps = [], []
    for number in range(rounds + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            speeds[name].append(SAMPLES * SEQUENCE / (time.perf_counter() - began))
        step = BATCH * SEQUENCE / speeds["decode"][-1]
        wait = beside_a_step(stream, batches, step)
        if number:  # the first round compiles and opens
            waits.append(wait)
            steps.append(step)
    decode, reader = (statistics.median(speeds[name][1:]) for name in ("decode", "reader"))
    ratios = [r / d for r, d in zip(speeds["reader"][1:], speeds["decode"][1:], strict=True)]
    return {
        "decode_tokens_per_s": round(decode),
        "reader_tokens_per_s": round(reader),
        "ratio": round(statistics.median(ratios), 3),
        "step_ms": round(1e3 * statistics.median(steps), 2),
        "wait_ms": round(1e3 * statistics.median(waits), 2),
        "bytes_per_token": round(sum(map(len, coded)) / SAMPLES / SEQUENCE, 1),
    }


def beside_a_step(stream: SampleStream, batches: int, seconds: float) -> float:
    """Mean wait for a batch where each is followed by so long a step of another device."""
    waited = 0.0
    for _ in range(batches):
        began = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - began
        time.sleep(seconds)
    return waited / batches


if __name__ == "__main__":
    main()
