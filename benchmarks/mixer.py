"""Time and memory of one mixer layer against causal softmax attention of the same heads, as ratios in one run.

    python benchmarks/mixer.py [--lengths 512 2048 8192] [--device cuda --dtype bfloat16] [--json out.json]

`core` leaves the projections out (q, k, v are given), `layer` has them in. Both sides run in turn, each round one after
the other, and the ratio is that of the medians: on a shared machine a pair of neighbours sees the same disturbance.
Peak memory is that of one forward + backward above what was held before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from xlstm_distill.model import HybridConfig
from xlstm_distill.model.mixer import HybridMixer

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
Run = tuple[Callable[[], Tensor], list[Tensor]]
"""A forward, and what its backward is for: inputs and parameters."""


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_bytes(options, options.peak[0], int(options.peak[1])))
        return
    rows = [measure(options, length) for length in options.lengths]
    result = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


def measure(options: argparse.Namespace, length: int) -> dict[str, float]:
    """Milliseconds, ratios mixer / attention and peak bytes at one length; one line each."""
    row: dict[str, float] = {"length": length}
    sides = make_sides(options, length)
    for scope in ("core", "layer"):
        attention, mixer = sides[f"attention_{scope}"], sides[f"mixer_{scope}"]
        for kind, step in (("forward", forward), ("forward_backward", forward_backward)):
            times = rounds([lambda s=step, r=attention: s(r), lambda s=step, r=mixer: s(r)], options)
            ours, theirs = statistics.median(times[1]), statistics.median(times[0])
            row |= {f"{scope}/{kind}/attention_ms": theirs, f"{scope}/{kind}/mixer_ms": ours}
            row[f"{scope}/{kind}/ratio"] = ours / theirs
            print(
                f"T {length:6} {scope:6} {kind:17} {theirs:9.1f} ms  {ours:9.1f} ms  {ours / theirs:5.2f}×", flush=True
            )
    for side in ("attention_core", "mixer_core"):
        row[f"{side}/peak_bytes"] = peak(options, side, length)
    ours, theirs = row["mixer_core/peak_bytes"], row["attention_core/peak_bytes"]
    print(f"T {length:6} core   peak              {theirs / 1e6:9.1f} MB  {ours / 1e6:9.1f} MB  {ours / theirs:5.2f}×")
    return row


def make_sides(options: argparse.Namespace, length: int) -> dict[str, Run]:
    """What is timed, by name, each a forward with a graph behind it."""
    torch.manual_seed(0)
    heads, dim, device, dtype = options.heads, options.head_dim, options.device, getattr(torch, options.dtype)
    base = AutoConfig.for_model(
        "llama", hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=1,
        max_position_embeddings=2 * length, vocab_size=8, intermediate_size=8,
    )  # fmt: skip
    config = HybridConfig(base, window=options.window, chunk=options.chunk)
    base._attn_implementation = "sdpa"
    attention = LlamaAttention(base, 0).to(device, dtype)
    mixer = HybridMixer(config, LlamaAttention(base, 0)).to(device, dtype)
    hidden = torch.randn(1, length, heads * dim, device=device, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        rope = LlamaRotaryEmbedding(base).to(device)(hidden, torch.arange(length, device=device)[None])
        projected = mixer.project(hidden, rope)
    given = type(projected)(*(x.detach().contiguous().requires_grad_() for x in projected[:6]), *projected[6:])
    inputs, both = [given.rotated_query, given.rotated_key, given.value], [given.query, given.key, given.hidden]
    new = [p for name, p in mixer.named_parameters() if "proj" not in name]
    return {
        "attention_core": (lambda: F.scaled_dot_product_attention(*inputs, is_causal=True), inputs),
        "mixer_core": (lambda: mixer.mix(given, None), inputs + both + new),
        "attention_layer": (lambda: attention(hidden, rope, None)[0], [hidden, *attention.parameters()]),
        "mixer_layer": (lambda: mixer(hidden, rope)[0], [hidden, *mixer.parameters()]),
    }


def forward(run: Run) -> None:
    """Without a graph."""
    with torch.no_grad():
        run[0]()


def forward_backward(run: Run) -> None:
    """Output and gradients."""
    out = run[0]()
    torch.autograd.grad(out, run[1], torch.ones_like(out))


def rounds(sides: list[Callable[[], None]], options: argparse.Namespace) -> list[list[float]]:
    """Milliseconds of each side in each round, after two rounds of warm-up."""
    times: list[list[float]] = [[] for _ in sides]
    for n in range(options.rounds + 2):
        for side, taken in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            if options.device != "cpu":
                torch.cuda.synchronize()
            if n >= 2:
                taken.append((time.perf_counter() - start) * 1e3)
    return times


def peak(options: argparse.Namespace, side: str, length: int) -> int:
    """Peak bytes of one forward + backward, in a process of its own whose allocator gives back what is freed."""
    if options.device != "cpu":
        return peak_bytes(options, side, length)
    arguments = [sys.executable, __file__, "--peak", side, str(length)]
    for name in ("heads", "head_dim", "window", "chunk", "dtype"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True).stdout)


def peak_bytes(options: argparse.Namespace, side: str, length: int) -> int:
    """In this process: of the second call, above what was held before it."""
    run = make_sides(options, length)[side]
    forward_backward(run)
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(run)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := now
    forward_backward(run)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process by /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
