"""Reading and writing speed, and the state they need: a teacher against its student, in turn in one run.

    python benchmarks/decode.py [TEACHER] [--student FOLDER] [--json out.json]

TEACHER is a Hugging Face folder, by default the demo's (after `make demo`), the student by default its conversion with
W = 512 and 4 sinks: training changes the weights, not the work. Prefill is measured up to 8192 tokens; decoding beyond
that reads caches of random values. The teacher's cache is transformers' default (`DynamicCache`).
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from xlstm_distill.model import HybridForCausalLM, convert

PREFILL = (512, 1024, 2048, 4096, 8192)
DECODE = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, nargs="?", default=Path("runs/demo/jobs/fetch/output/teacher"))
    parser.add_argument("--student", type=Path)
    parser.add_argument("--prefill", type=int, nargs="*", default=PREFILL)
    parser.add_argument("--decode", type=int, nargs="*", default=DECODE)
    parser.add_argument("--tokens", type=int, default=15, help="tokens written per length")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.teacher / "config.json").exists():
        print(f"{options.teacher}: no model there; make demo fetches one")
        return
    models = load(options)
    result = {"threads": torch.get_num_threads(), "prefill": [], "decode": []}
    with torch.inference_mode():
        for length in options.prefill:
            result["prefill"].append(prefill_row(models, length))
        for length in options.decode:
            result["decode"].append(decode_row(models, length, options.tokens))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


def load(options: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """Teacher and student by name."""
    dtype = getattr(torch, options.dtype)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=dtype).eval().to(options.device)
    with tempfile.TemporaryDirectory() as folder:
        if not options.student:
            convert(options.teacher, Path(folder), window=512, sinks=4)
        student = HybridForCausalLM.from_pretrained(options.student or folder, dtype=dtype).eval().to(options.device)
    return {"teacher": teacher, "student": student}


def prefill_row(models: dict[str, PreTrainedModel], length: int) -> dict[str, float]:
    """Tokens per second of reading `length` tokens at once, the better of two."""
    row: dict[str, float] = {"length": length}
    for _ in range(2):
        for name, model in models.items():
            start = clock(model)
            read(model, length, empty_cache(model))
            row[name] = max(row.get(name, 0.0), length / (clock(model) - start))
    print(f"prefill {length:6}  teacher {row['teacher']:8.0f} tok/s  student {row['student']:8.0f} tok/s", flush=True)
    return row


def decode_row(models: dict[str, PreTrainedModel], length: int, tokens: int) -> dict[str, float]:
    """Median milliseconds per token behind `length` tokens, and the bytes of the state."""
    row: dict[str, float] = {"length": length}
    caches = {name: random_cache(model, length) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for n in range(tokens + 2):
        for name, model in models.items():
            start = clock(model)
            read(model, 1, caches[name])
            if n >= 2:
                times[name].append(clock(model) - start)
    for name in models:
        row |= {f"{name}_ms": 1e3 * statistics.median(times[name]), f"{name}_bytes": nbytes(caches[name])}
    print(
        f"decode  {length:6}  teacher {row['teacher_ms']:8.1f} ms {row['teacher_bytes'] / 1e6:8.1f} MB"
        f"  student {row['student_ms']:8.1f} ms {row['student_bytes'] / 1e6:8.1f} MB"
        f"  {row['student_ms'] / row['teacher_ms']:.2f}×",
        flush=True,
    )
    return row


def read(model: PreTrainedModel, length: int, cache: Any) -> None:
    """Forward of random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def empty_cache(model: PreTrainedModel) -> Any:
    """State before the first token."""
    return model.new_cache() if isinstance(model, HybridForCausalLM) else DynamicCache(config=model.config)


def random_cache(model: PreTrainedModel, length: int) -> Any:
    """A cache that holds `length` tokens of random keys and values."""
    cache = empty_cache(model)
    if isinstance(model, HybridForCausalLM):
        read(model, 600, cache)  # more than the window: what follows costs the same at every length
        for layer in cache.layers:
            ahead = length - layer.cumulative_length
            layer.cumulative_length += ahead
            layer.seen += ahead
            layer.positions[:, layer.sinks :] += ahead
        return cache
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, dim)
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), layer)
    return cache


def nbytes(cache: Any) -> int:
    """Bytes of keys and values, or of the student's state."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def clock(model: PreTrainedModel) -> float:
    """Seconds, after what the device was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
