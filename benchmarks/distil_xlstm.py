"""Distil-xLSTM's cells on this machine: the sLSTM's recurrence beside the package's `vanilla` backend, and what a
gradient without the mLSTM's normaliser would cost, with the norm behind the cell and without it.

    python benchmarks/distil_xlstm.py [--width 576] [--batch 2] [--length 512] [--repeats 3] [--json FILE]

Times are medians of interleaved repeats on one thread. The differences are relative, of the gradients with respect to
q, k, i and f of an mLSTM in float64; 1 is as large as the gradient itself.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from xlstm_distill.model.distil_blocks import SLSTMCell
from xlstm_distill.model.xlstm_package import LayerNorm, sLSTMCell_vanilla, sLSTMLayerConfig

HEADS = 4


def slstm(width: int, batch: int, length: int, repeats: int) -> dict[str, float]:
    """Seconds of forward and backward, ours and the package's, and the largest relative difference of gradients."""
    config = sLSTMLayerConfig(embedding_dim=width, num_heads=HEADS, backend="vanilla")
    ours, theirs = SLSTMCell(config), sLSTMCell_vanilla(config)
    torch.nn.init.normal_(ours._recurrent_kernel_, std=width**-0.5)
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(batch, length, 4 * width, requires_grad=True)
    mix = torch.randn(batch, HEADS, length, width // HEADS)
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(inputs, {}, None)[0],
        "package": lambda: theirs(inputs)[0],
    }
    cells = {"ours": ours, "package": theirs}
    seconds: dict[str, list[float]] = {f"{name}_{part}": [] for name in runs for part in ("forward", "backward")}
    gradients = {}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            output = run()
            middle = time.perf_counter()
            gradients[name] = torch.autograd.grad((output * mix).sum(), [inputs, *cells[name].parameters()])
            seconds[f"{name}_forward"].append(middle - began)
            seconds[f"{name}_backward"].append(time.perf_counter() - middle)
    different = max(_difference(a, b) for a, b in zip(gradients["ours"], gradients["package"], strict=True))
    return {name: statistics.median(values) for name, values in seconds.items()} | {"difference": different}


def normaliser(length: int, dim: int, scale: float) -> dict[str, float]:
    """Relative error of gradients that leave out the one through the normaliser: of the cell, and behind its norm."""
    q, k, v = (scale * torch.randn(HEADS, length, dim, dtype=torch.float64) for _ in range(3))
    i, f = torch.randn(HEADS, length, dtype=torch.float64), 4 + torch.randn(HEADS, length, dtype=torch.float64)
    learnt = [x.requires_grad_() for x in (q, k, i, f)]
    mix, norm = torch.randn(HEADS, length, dim, dtype=torch.float64), LayerNorm(dim).double()

    def cell(through: bool) -> Tensor:
        decay = torch.nn.functional.logsigmoid(f).cumsum(1)
        weights = (decay[:, :, None] - decay[:, None, :] + i[:, None, :]).exp().tril()
        scores = weights * (q @ k.transpose(1, 2)) / math.sqrt(dim)
        below = scores.sum(-1, keepdim=True).abs().clamp_min(1.0)
        return scores @ v / (below if through else below.detach())

    found = {}
    for name, behind in (("cell", lambda h: h), ("behind_norm", norm)):
        exact, without = (torch.autograd.grad((behind(cell(x)) * mix).sum(), learnt) for x in (True, False))
        found[name] = max(_difference(a, b) for a, b in zip(without, exact, strict=True))
    return found


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {
        "slstm": slstm(options.width, options.batch, options.length, options.repeats),
        "normaliser": {f"{scale:g}": normaliser(64, 16, scale) for scale in (0.3, 1.0, 3.0)},
    }
    times = found["slstm"]
    for part in ("forward", "backward"):
        ours, package = times[f"ours_{part}"], times[f"package_{part}"]
        print(f"sLSTM {part}: {ours:.3f} s, the package's vanilla backend {package:.3f} s ({package / ours:.1f}×)")
    print(f"largest relative difference of a gradient: {times['difference']:.1e}")
    for scale, errors in found["normaliser"].items():
        print(f"without the normaliser's gradient, inputs × {scale}: {errors['cell']:.1e} of the cell's, "
              f"{errors['behind_norm']:.1e} behind its norm")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
