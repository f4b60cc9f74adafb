"""What a training step costs besides its arithmetic: overhead over a bare loop, memory against depth, speed and MFU.

    python benchmarks/step.py                      # SmolLM2's shape: overhead, and Stage I's memory at 6 and 30 layers
    python benchmarks/step.py --part speed         # tokens/s and MFU of both stages
    python benchmarks/step.py --part speed --shape 8b --batch 4 --strategy fsdp --recompute        # on a GPU

Weights and tokens are random; no time depends on them. *Overhead*: one Stage II step of the task (`gradients`,
`update`, with the clock that divides its time) against the same forward, loss, backward, clipping and optimiser step
written straight down, on the same model and optimiser; both sides in turn in one process, the ratio of the medians, and
the median of the ratios of neighbours. *Memory*: peak of one Stage I step above what was held before, in a process of
its own; what the step holds until its end, the gradients, is told apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from xlstm_distill.contract.flops import step_flops
from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import AdamW, Align, Distill, Strategy
from xlstm_distill.data.stream import Batch
from xlstm_distill.model import convert
from xlstm_distill.objectives.distill import distillation_loss
from xlstm_distill.parallel.fsdp import FullySharded
from xlstm_distill.parallel.strategy import Strategy as Single
from xlstm_distill.runtime.device import peak_flops
from xlstm_distill.teacher.targets import OnlineTargets, TargetSource, cached_targets
from xlstm_distill.train.align import Alignment
from xlstm_distill.train.distill import Distillation
from xlstm_distill.train.loop import Task
from xlstm_distill.train.students import empty_student

ROOT = Path(__file__).parents[1]
SHAPES = {"smollm2": "smollm2-135m", "8b": "llama-3.1-8b"}
"""Name → file of configs/teacher."""
PARTS = ("overhead", "memory", "speed")
DEPTHS = (6, 30)
TOP_K = 32


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=("overhead", "memory"))
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, default=0, help="of the shape; 0: all")
    parser.add_argument("--length", type=int, default=0, help="tokens per sequence; 0: 512, for 8b 4096")
    parser.add_argument("--batch", type=int, default=1, help="sequences per step, one per forward")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--strategy", choices=("single", "fsdp"), default="single")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing in Stage II")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.length = options.length or (4096 if options.shape == "8b" else 512)
    if options.peak:
        print(json.dumps(stage_i_peak(options, options.peak)))
        return
    result: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(options)}
    with tempfile.TemporaryDirectory() as place:
        for part in options.part:
            result[part] = globals()[part](options, Path(place))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, default=str), encoding="utf-8")


def overhead(options: argparse.Namespace, place: Path) -> dict[str, dict[str, float]]:
    """Stage II: seconds of the task and of the bare loop, by kind of targets."""
    folder, found = make_models(options, place, options.layers), {}
    strategy = make_strategy(options)
    for kind in ("cached", "online"):
        task = stage_ii(options, folder, strategy, kind)
        batch = random_batch(options, task.model.config.vocab_size, cached=kind == "cached")
        times = in_turn([partial(task_step, task, batch), partial(bare_step, task, batch)], options.rounds)
        ours, bare = map(statistics.median, times)
        pairs = statistics.median(a / b for a, b in zip(*times, strict=True))
        found[kind] = {"task_s": ours, "bare_s": bare, "ratio": ours / bare, "pairs": pairs}
        print(
            f"Stage II step, {kind} targets: task {ours:.3f} s, bare {bare:.3f} s, {ours / bare:.3f}×; "
            f"median of pairs {pairs:.3f}×",
            flush=True,
        )
    return found


def memory(options: argparse.Namespace, place: Path) -> dict[int, dict[str, float]]:
    """Stage I: bytes by depth, each in a process of its own whose allocator gives back what is freed."""
    found = {}
    for layers in DEPTHS:
        folder = make_models(options, place, layers)
        command = [sys.executable, __file__, "--peak", str(folder)]
        command += ["--device", options.device, "--shape", options.shape, "--length", str(options.length)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found[layers] = sizes = json.loads(done.stdout.splitlines()[-1])
        print(
            f"Stage I step, {layers:2} layers: model {sizes['model'] / 1e6:7.1f} MB, peak above it and the optimiser "
            f"{sizes['peak'] / 1e6:6.1f} MB, of which gradients {sizes['gradients'] / 1e6:.1f} MB",
            flush=True,
        )
    return found


def speed(options: argparse.Namespace, place: Path) -> dict[str, dict[str, float]]:
    """Both stages: tokens per second and MFU."""
    folder, strategy, found = make_models(options, place, options.layers), make_strategy(options), {}
    peak = peak_flops(strategy.device, strategy.dtype)
    print(f"peak {peak.flops / 1e12:.4g} TFLOP/s ({peak.source})", flush=True)
    for stage in ("align", "distill"):
        task = stage_i(options, folder, strategy) if stage == "align" else stage_ii(options, folder, strategy, "cached")
        config = task.model.config
        batch = random_batch(options, config.vocab_size, cached=True)
        (seconds,) = in_turn([partial(task_step, task, batch)], options.rounds)
        rate = options.batch * options.length / statistics.median(seconds)
        flops = step_flops(stage, config, config, options.length).total
        found[stage] = {"tokens_per_s": rate, "mfu": rate * flops / peak.flops, "flops_per_token": flops}
        held = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if options.device == "cuda" else ""
        print(
            f"{stage}, {config.num_hidden_layers} layers: {rate:,.0f} tokens/s, {flops / 1e9:.3f} GFLOP per "
            f"token, MFU {found[stage]['mfu']:.1%}{held}",
            flush=True,
        )
    return found


def make_models(options: argparse.Namespace, place: Path, layers: int) -> Path:
    """Folder with a random `teacher` and its `student`."""
    raw = yaml.safe_load((ROOT / "configs" / "teacher" / f"{SHAPES[options.shape]}.yaml").read_text(encoding="utf-8"))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    names += ("intermediate_size", "max_position_embeddings", "tie_word_embeddings")
    shape = {name: raw[name] for name in names} | ({"num_hidden_layers": layers} if layers else {})
    folder = place / f"{options.shape}-{shape['num_hidden_layers']}"
    if not folder.exists():
        torch.manual_seed(0)
        dtype = torch.bfloat16 if options.shape == "8b" else torch.float32
        teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["family"], **shape), dtype=dtype)
        teacher.save_pretrained(folder / "teacher")
        del teacher
        (folder / "student").mkdir()
        convert(folder / "teacher", folder / "student", window=min(512, options.length // 4), sinks=4)
    return folder


def make_strategy(options: argparse.Namespace) -> Single:
    """For the one process that this is."""
    settings = Strategy(
        name=options.strategy,
        precision="bfloat16" if options.device == "cuda" else "float32",
        activation_checkpointing=options.recompute,
    )
    return FullySharded(settings, World()) if options.strategy == "fsdp" else Single(settings, World())


def stage_i(options: argparse.Namespace, folder: Path, strategy: Single) -> Alignment:
    """As `train/align.py` sets it up."""
    model = empty_student(folder / "student")
    model.requires_grad_(False)
    new, idle = model.mixer_parameters(), model.idle_parameters()
    strategy.prepare(model, folder / "student", replicated=new.values())
    for name, parameter in new.items():
        parameter.requires_grad_(name not in idle)
    return Alignment(model, Align(batch=options.batch), AdamW(), strategy, {})


def stage_ii(options: argparse.Namespace, folder: Path, strategy: Single, kind: str) -> Distillation:
    """As `train/distill.py` sets it up."""
    model = empty_student(folder / "student")
    if options.recompute:
        model.activation_checkpointing_enable()
        model.train()
    strategy.prepare(model, folder / "student")
    settings = Distill(batch=options.batch, targets=kind)  # type: ignore[arg-type]
    targets: TargetSource = cached_targets
    if kind == "online":
        targets = OnlineTargets(folder / "teacher", settings, TOP_K, strategy)
    return Distillation(model, targets, settings, AdamW(), strategy, {})


def random_batch(options: argparse.Namespace, vocabulary: int, cached: bool) -> Batch:
    """Tokens, of which all count, and targets."""
    torch.manual_seed(1)
    size, length = options.batch, options.length
    tokens = torch.randint(vocabulary, (size, length + 1))
    targets = None
    if cached:
        log_probs = torch.randn(size, length, TOP_K + 1).log_softmax(-1)
        ids = torch.rand(size, length, vocabulary).topk(TOP_K).indices
        targets = (ids, log_probs[..., :-1], log_probs[..., -1])
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens), targets)


def task_step(task: Task, batch: Batch) -> None:
    """One step as the training loop makes it."""
    task.gradients(batch)
    task.update()


def bare_step(task: Distillation, batch: Batch) -> None:
    """The same arithmetic, written straight down."""
    settings, model, device = task.settings, task.model, task.strategy.device
    weights = batch.mask[:, 1:].float().to(device) / batch.mask[:, 1:].sum().to(device)
    total = torch.zeros((), device=device)
    for row in range(len(batch.tokens)):
        part = batch.rows(slice(row, row + 1)).to(device)
        targets = task.targets(part)

        def objective(hidden: Tensor, head: Tensor) -> Tensor:
            labels, own = part.tokens[:, 1:].flatten(), weights[row : row + 1].flatten()  # noqa: B023
            return distillation_loss(
                hidden.flatten(0, 1), head, labels, own, targets,  # noqa: B023
                kind=settings.loss, gamma=settings.gamma, beta=settings.beta,
            ).loss  # fmt: skip

        with torch.autocast(device.type, torch.bfloat16, enabled=task.strategy.dtype == torch.bfloat16):
            loss = model(input_ids=part.tokens[:, :-1], objective=objective).loss
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    task.optimizer.step()
    task.optimizer.zero_grad()
    total.item()


def in_turn(sides: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each side in each round, after one of warm-up; every other round begins with the other side."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        order = range(len(sides)) if number % 2 else reversed(range(len(sides)))
        for side in order:
            began = time.perf_counter()
            sides[side]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[side].append(time.perf_counter() - began)
    return times


def stage_i_peak(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Bytes in this process: of the model, of the gradients, and the peak of the second step above what was held."""
    task = stage_i(options, folder, make_strategy(options))
    batch = random_batch(options, task.model.config.vocab_size, cached=False)
    task_step(task, batch)
    sizes = {
        "model": sum(p.numel() * p.element_size() for p in task.model.parameters()),
        "gradients": sum(p.numel() * 4 for p in task.parameters.values()),
    }
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task_step(task, batch)
        return sizes | {"peak": torch.cuda.max_memory_allocated() - before}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := now
    task_step(task, batch)
    return sizes | {"peak": resident("VmHWM") - before}


def resident(name: str) -> int:
    """Bytes of this process by /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
