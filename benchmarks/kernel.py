"""Time and memory of the mLSTM kernels against causal softmax attention of the same shape, on one GPU, as JSON.

    python benchmarks/kernel.py [--lengths 2048 8192 32768] [--heads 32] [--width 128] [--batch 1] [--rounds 20]

`torch` is the torch form, `triton` Triton's kernel (both as training calls them: q, k float32, v bfloat16, bfloat16
products by autocast; `float32`: without autocast), `attention` is scaled_dot_product_attention in bfloat16. Times are
medians of CUDA events; the sides take turns, so that the clock's drift meets all alike. Before anything is timed the
kernels are compared with float64. Without a CUDA device it says so and measures nothing.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from xlstm_distill.model.kernel import check, choose

GPU = torch.device("cuda")
WARM_UP = 3


def main() -> None:
    """Measure every length and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (benchmarks/mixer.py measures the torch form on a CPU)")
        return
    errors = {
        f"{name} {str(dtype).removeprefix('torch.')}": check(
            choose(name, GPU), GPU, dtype, options.width, options.width, options.chunk
        )
        for name in ("torch", "triton")
        for dtype in (torch.float32, torch.bfloat16)
    }
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "settings": vars(options),
                "largest relative error against float64": errors,
                "lengths": {length: measure(options, length) for length in options.lengths},
            },
            indent=2,
        )
    )


def measure(options: argparse.Namespace, length: int) -> dict[str, dict[str, float]]:
    """Milliseconds, tokens per second and peak bytes of each side's forward, and forward + backward."""
    sides = make_sides(options, length)
    found: dict[str, dict[str, float]] = {name: {} for name in sides}
    for kind, backward in (("forward", False), ("forward_backward", True)):
        steps = {name: partial(step, side, inputs, backward) for name, (side, inputs) in sides.items()}
        for name, times in in_turns(steps, options.rounds).items():
            milliseconds = statistics.median(times)
            found[name][f"{kind}_ms"] = round(milliseconds, 4)
            found[name][f"{kind}_tokens_per_s"] = round(1e3 * options.batch * length / milliseconds)
            found[name][f"{kind}_peak_bytes"] = peak_bytes(steps[name])
    return found


def make_sides(options: argparse.Namespace, length: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Forward and inputs of each side by name."""
    generator = torch.Generator(GPU).manual_seed(0)
    draw = partial(torch.randn, device=GPU, generator=generator)
    shape = (options.batch, options.heads, length, options.width)
    features, value = [draw(shape).softmax(-1) for _ in range(2)], draw(shape).bfloat16()
    gates = [draw(shape[:3]), F.logsigmoid(draw(shape[:3]) + 4)]
    cell = [x.requires_grad_() for x in (*features, value, *gates)]
    heads = [draw(shape).bfloat16().requires_grad_() for _ in range(3)]

    def recurrent(name: str, autocast: bool, *inputs: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return choose(name, GPU)(*inputs, None, options.chunk)[0]

    return {
        "attention": (partial(F.scaled_dot_product_attention, is_causal=True), heads),
        **{name: (partial(recurrent, name, True), cell) for name in ("torch", "triton")},
        **{f"{name} float32": (partial(recurrent, name, False), cell) for name in ("torch", "triton")},
    }


def step(side: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> None:
    """One forward, or one forward and backward with a gradient of ones."""
    if not backward:
        with torch.no_grad():
            side(*inputs)
        return
    output = side(*inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, `rounds` times, one step after the other."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        for name, run in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                times[name].append(start.elapsed_time(end))
    return times


def peak_bytes(run: Callable[[], None]) -> int:
    """Most bytes held during `run` above what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
