"""What each part of the student is worth: alignment error and end-to-end KL at equal budgets, over seeds.

    python benchmarks/ablation.py [RUN] [--out FOLDER]   # RUN: one whose fetch and tokenize are finished, as the demo's

Stage I of all variants at once: per batch one pass of the frozen teacher, and in each layer every variant's mixer
learns the same target from the same q, k, v (layers are independent, Eq. 12). All start from the specified values and
read the same sequences; a seed is another draw of training sequences. Then each variant's student, all layers
replaced, is compared with the teacher on held-out sequences, the same for all seeds. A finished seed stands in
`ablation.json`; the same command goes on behind it.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.gates import heads_shut
from xlstm_distill.contract.schema import AdamW, Align
from xlstm_distill.data.stream import read_samples
from xlstm_distill.model import HybridConfig, HybridForCausalLM, convert
from xlstm_distill.model.cache import HybridLayerCache
from xlstm_distill.model.gates import GateRecorder
from xlstm_distill.model.layout import Layout
from xlstm_distill.model.mixer import HybridMixer, Projected
from xlstm_distill.model.mlstm import mlstm_sums, normalise
from xlstm_distill.objectives.align import teacher_attention
from xlstm_distill.train.optim import make_optimizer, set_learning_rate

OURS = "mLSTM + window + sinks"


class SharingMixer(HybridMixer):
    """A mixer that takes the window's part, which nothing trains, from the variant that computed it first."""

    windows: dict[int, Tensor] | None = None
    """The window's part by number of sinks, of one layer and one batch; None: each computes its own."""

    def _window_branch(self, p: Projected, layout: Layout | None, layer: HybridLayerCache | None) -> Tensor:
        if self.windows is None:
            return super()._window_branch(p, layout, layer)
        if self.config.sinks not in self.windows:
            self.windows[self.config.sinks] = super()._window_branch(p, layout, layer)
        return self.windows[self.config.sinks]


class EvictedMixer(SharingMixer):
    """The state holds only what left the window: position t reads the sums of t − W; o is 0 where nothing has left."""

    def mix(self, projected: Projected, layout: Layout | None, layer: HybridLayerCache | None = None) -> Tensor:
        """[B, H, T, D]."""
        above, below = self.evicted(projected)
        windowed = self._window_branch(projected, layout, layer)
        share = self.share(projected, below)
        if self.gate_hook:
            self.gate_hook(self.layer_idx, share, None)
        return torch.lerp(windowed, normalise(above, below), share)

    def share(self, projected: Projected, below: Tensor) -> Tensor:
        """The recurrent branch's share [B, H, T, 1]."""
        return self.gate(projected).masked_fill(below <= 0, 0.0)

    def evicted(self, p: Projected) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the state W positions back; 0 before."""
        log_input, log_forget = self._log_gates(p.hidden, None)
        query = self.feature_map(p.rotated_query, self.query_map)
        key = self.feature_map(self._repeat(p.rotated_key), self.key_map)
        late = (self.window, 0)
        key, value = (F.pad(x, (0, 0, *late))[:, :, : x.shape[2]] for x in (key, self._repeat(p.value)))
        log_input = F.pad(log_input, late, value=-math.inf)[..., : log_input.shape[2]]
        log_forget = F.pad(log_forget, late)[..., : log_forget.shape[2]]
        return mlstm_sums(query, key, value, log_input, log_forget, None, self.config.chunk)[:2]


class CommonNormaliserMixer(EvictedMixer):
    """The same under one normaliser: (Σ e^(s−m) v + e^u φ(q) S) / (Σ e^(s−m) + e^u φ(q) z), u the gate's logit.

    s are the scores of window and sinks and m each query's largest: against e^s itself the state would start with a
    share of 1e-4, and learn next to nothing. Computed as the recurrent share σ(u + log φ(q) z − log Σ e^(s−m)): no
    exponential appears, and 0 ≤ log Σ e^(s−m) ≤ log(W + sinks).
    """

    def share(self, projected: Projected, below: Tensor) -> Tensor:
        """The recurrent branch's share [B, H, T, 1]."""
        scores = projected.rotated_query @ self._repeat(projected.rotated_key).mT * self.head_dim**-0.5
        index = torch.arange(scores.shape[-1])
        distance = index[:, None] - index
        seen = (distance >= 0) & ((distance < self.window) | (index < self.config.sinks))
        scores = scores.masked_fill(~seen, -math.inf)
        mass = scores.logsumexp(-1, keepdim=True) - scores.amax(-1, keepdim=True)
        logit = self.output_gate(projected.query, projected.key, projected.value)
        return torch.sigmoid(logit + below.clamp_min(1e-30).log() - mass).masked_fill(below <= 0, 0.0)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    choices: dict[str, Any] = field(default_factory=dict)
    """Fields of `HybridConfig`."""
    lr: float = 1e-2
    mixer: type[SharingMixer] = SharingMixer
    trained: bool = True


VARIANTS = (
    Variant("window + sinks, untrained", {"use_mlstm": False}, trained=False),
    Variant("linear attention", {"use_window": False, "use_gates": False}),
    Variant("mLSTM", {"use_window": False}),
    Variant("mLSTM + window", {"sinks": 0}),
    Variant(OURS),
    Variant("  o bias 0, lr 1e-2", {"output_gate_bias": 0.0}),
    Variant("  o bias 0, lr 3e-3", {"output_gate_bias": 0.0}, lr=3e-3),
    Variant("  lr 3e-3", lr=3e-3),
    Variant("  hedgehog", {"feature_map": "hedgehog"}),
    Variant("  φ before RoPE", {"feature_rope": "after"}),
    Variant("  no RoPE in the mLSTM", {"feature_rope": "none"}),
    Variant("  o from x", {"gate_input": "hidden"}),
    Variant("  o from q, k after RoPE", {"gate_input": "qkv_rotated"}),
    Variant("  i = f = 1", {"use_gates": False}),
    Variant("  state: only what left the window", mixer=EvictedMixer),
    Variant("  left the window, one normaliser", mixer=CommonNormaliserMixer),
)


class Trainee:
    """The mixers of one variant in all layers, sharing the projections of `model`, and their optimiser."""

    def __init__(self, variant: Variant, model: HybridForCausalLM, settings: Align) -> None:
        base = model.config
        common = {"window": base.window, "sinks": base.sinks, "chunk": base.chunk}
        config = HybridConfig(base.base, **(common | variant.choices))
        self.variant, self.settings = variant, settings
        self.mixers = nn.ModuleList(variant.mixer(config, mixer) for mixer in model.mixers)
        frozen = {id(p) for p in model.parameters()}
        self.new = {name: p for name, p in self.mixers.named_parameters() if id(p) not in frozen}
        self.layers = [[p for p in mixer.parameters() if id(p) not in frozen] for mixer in self.mixers]
        self.optimizer = make_optimizer({variant.lr: self.new}, AdamW())
        self.errors = torch.zeros(len(self.layers))
        """Σ‖h − ĥ‖² per layer since the last reset."""
        self.gates = GateRecorder(self.mixers) if config.use_mlstm and config.use_window else None
        """Of the held-out sequences."""

    def learn(
        self, layer: int, projected: Projected, target: Tensor, windows: dict[int, Tensor], *, train: bool
    ) -> None:
        """Forward and, in training, backward of one layer; `windows`: see `SharingMixer`."""
        mixer = self.mixers[layer]
        mixer.windows = windows
        with torch.set_grad_enabled(train):
            error = (target - mixer.mix(projected, None)).square().sum()
            if train:
                (error / target.square().sum()).backward()
        mixer.windows = None
        self.errors[layer] += error.detach()

    def shut(self) -> int | None:
        """Heads whose mean output gate on the held-out sequences leaves one branch out; None without a gate."""
        return len(heads_shut(self.gates.means().tolist())) if self.gates else None

    def step(self, step: int, steps: int) -> None:
        """One step of AdamW, each layer's gradient clipped by itself."""
        set_learning_rate(self.optimizer, step, steps, self.settings)
        for parameters in self.layers:
            nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class TeacherPass:
    """Put in place of every mixer's `mix`: the stream goes on with the teacher's output, every trainee learns it."""

    def __init__(self, model: HybridForCausalLM, trainees: Sequence[Trainee]) -> None:
        self.model, self.trainees, self.train = model, trainees, True
        self.norms = torch.zeros(len(model.mixers))
        """Σ‖h‖² per layer since the last reset."""
        for mixer in model.mixers:
            mixer.objective = self

    def __call__(self, mixer: HybridMixer, projected: Projected, layout: Layout | None) -> Tensor:
        """The teacher's h [B, H, T, D]."""
        projected, target = projected.detach(), teacher_attention(mixer, projected, layout)
        self.norms[mixer.layer_idx] += target.square().sum()
        windows: dict[int, Tensor] = {}
        for trainee in self.trainees:
            if trainee.variant.trained or not self.train:
                trainee.learn(mixer.layer_idx, projected, target, windows, train=self.train)
        return target

    @torch.no_grad()
    def run(self, tokens: Tensor, *, train: bool) -> Tensor:
        """One forward of [B, T] tokens; the teacher's last hidden states [B, T, hidden]."""
        self.train = train
        return self.model(input_ids=tokens, objective=lambda hidden, head: hidden).loss

    def held_out(self, tokens: Tensor) -> tuple[dict[str, list[float]], list[Tensor]]:
        """Relative error ‖h − ĥ‖²/‖h‖² of each layer by variant, and the teacher's hidden states of each sequence."""
        self.norms.zero_()
        for trainee in self.trainees:
            trainee.errors.zero_()
        with ExitStack() as recording:
            for trainee in self.trainees:
                recording.enter_context(trainee.gates or nullcontext())
            hidden = [self.run(row[None, :-1], train=False) for row in tokens]
        return {t.variant.name: (t.errors / self.norms).tolist() for t in self.trainees}, hidden


@torch.no_grad()
def end_to_end(model: HybridForCausalLM, trainee: Trainee, tokens: Tensor, hidden: list[Tensor]) -> dict[str, float]:
    """Mean and median KL(teacher ‖ student) per token in nats, perplexity, with every layer replaced by the variant."""
    before = model.mixers
    for layer, mixer in zip(model.model.layers, trainee.mixers, strict=True):
        layer.self_attn = mixer
    kl, ce = [], 0.0
    for row, teacher_hidden in zip(tokens, hidden, strict=True):
        student = model(row[None, :-1]).logits[0].log_softmax(-1)
        teacher = model.lm_head(teacher_hidden)[0].log_softmax(-1)
        kl.append(F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1))
        ce += float(F.nll_loss(student, row[1:]))
    for layer, mixer in zip(model.model.layers, before, strict=True):
        layer.self_attn = mixer
    every = torch.cat(kl)
    return {"kl": float(every.mean()), "kl_median": float(every.median()), "ppl": math.exp(ce / len(tokens))}


def run_seed(
    model: HybridForCausalLM, seed: int, data: dict[str, Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """Train all variants on one draw of sequences; the held-out figures by variant."""
    settings = Align(lr=1e-2)
    variants = [v for v in VARIANTS if not options.variants or v.name.strip() in options.variants]
    trainees = [Trainee(variant, model, settings) for variant in variants]
    teacher = TeacherPass(model, trainees)
    mixed = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(0))
    order = mixed[seed * options.sequences : (seed + 1) * options.sequences]  # no sequence in two seeds
    start = time.monotonic()
    for step, number in enumerate(order.tolist()):
        teacher.run(data["train"][number][None, :-1], train=True)
        for trainee in trainees:
            if trainee.variant.trained:
                trainee.step(step, len(order))
        left = (time.monotonic() - start) / (step + 1) * (len(order) - step - 1)
        if step % 8 == 7:
            print(f"seed {seed}: sequence {step + 1}/{len(order)}, {left / 60:.1f} min to its evaluation", flush=True)
    errors, hidden = teacher.held_out(data["held_out"])
    for mixer in model.mixers:
        mixer.objective = None
    results = {}
    for trainee in trainees:
        name = trainee.variant.name
        figures = end_to_end(model, trainee, data["held_out"], hidden)
        of_layers = {"error": statistics.mean(errors[name]), "error_by_layer": errors[name]}
        results[name] = of_layers | {"heads_shut": trainee.shut(), **figures}
        print(f"seed {seed}: {name:34} E {results[name]['error']:.4f}  KL {figures['kl']:.4f}", flush=True)
    return results


def load(options: argparse.Namespace) -> tuple[HybridForCausalLM, dict[str, Tensor]]:
    """The converted teacher, and token sequences [N, T + 1] of all sources in turn."""
    jobs = options.run / "jobs"
    for needed in ("fetch", "tokenize"):
        if not (jobs / needed / "manifest.json").exists():
            print(f"{options.run}: no finished job {needed} there; make demo writes runs/demo", file=sys.stderr)
            raise SystemExit(2)
    with tempfile.TemporaryDirectory() as folder:
        convert(jobs / "fetch" / "output" / "teacher", Path(folder), window=options.window, sinks=options.sinks)
        model = HybridForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    shards = sorted(path for path in (jobs / "tokenize" / "output").iterdir() if path.is_dir())
    held_out = [read_samples(s / "validation", options.held_out // len(shards)).tokens for s in shards]
    train = torch.cat([read_samples(s / "train", 1 << 20).tokens for s in shards])
    return model, {"train": train, "held_out": torch.cat(held_out)}


def summary(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Per variant mean and standard deviation over seeds of E, KL and median KL, and the difference to ours by seed."""
    rows = []
    for name in next(iter(seeds.values())):
        row: dict[str, Any] = {"name": name, "heads_shut": [seed[name]["heads_shut"] for seed in seeds.values()]}
        for figure in ("error", "kl", "kl_median", "ppl"):
            values = [seed[name][figure] for seed in seeds.values()]
            row[figure] = statistics.mean(values)
            row[f"{figure}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
            if all(OURS in seed for seed in seeds.values()):
                row[f"{figure}_to_ours"] = [
                    v - seed[OURS][figure] for v, seed in zip(values, seeds.values(), strict=True)
                ]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| mixer | E | KL | median KL | perplexity | KL − ours, by seed | shut |", "| --- " * 7 + "|"]
    for row in rows:
        cells = [f"{row[f]:.3f} ± {row[f'{f}_std']:.3f}" for f in ("error", "kl", "kl_median")]
        apart = ", ".join(f"{d:+.3f}" for d in row.get("kl_to_ours", []))
        shut = ", ".join("" if n is None else str(n) for n in row["heads_shut"]).strip(", ")
        lines.append(f"| {row['name'].strip()} | {' | '.join(cells)} | {row['ppl']:.2f} | {apart} | {shut} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels of points with the standard deviation over seeds: alignment error and KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(rows, key=lambda row: row["error"])
    names = [row["name"].strip() for row in rows][::-1]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.34 * len(rows) + 1.2), sharey=True, layout="constrained")
    for axis, key, title in zip(
        axes, ("error", "kl"), ("held-out ‖h − ĥ‖² / ‖h‖²", "KL(teacher ‖ student), nats per token"), strict=True
    ):
        colours = ["#c2571a" if name == OURS else "#4a6fa5" for name in names]
        for y, (row, colour) in enumerate(zip(rows[::-1], colours, strict=True)):
            axis.errorbar(row[key], y, xerr=row[f"{key}_std"], fmt="o", color=colour, capsize=3)
        axis.set(xlabel=title, xscale="log")
        axis.grid(axis="both", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/ablation"))
    parser.add_argument("--sequences", type=int, default=48, help="training sequences per seed, one per step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=8, help="held-out sequences, over all sources")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--variants", nargs="*", default=[], help="names; default: all")
    options = parser.parse_args(arguments)
    names = {v.name.strip() for v in VARIANTS}
    if unknown := sorted(set(options.variants) - names):
        parser.error(f"--variants: unknown {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    options.out.mkdir(parents=True, exist_ok=True)
    place = options.out / "ablation.json"
    settings = {n: getattr(options, n) for n in ("sequences", "held_out", "window", "sinks", "variants")}
    described = {v.name: f"{v.mixer.__name__} {v.choices} lr {v.lr}" for v in VARIANTS}
    settings |= {"run": str(options.run), "align": asdict(Align(lr=1e-2)), "choices": described}
    result = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {"settings": settings, "seeds": {}}
    if result["settings"] != settings:
        changed = sorted(k for k in settings if settings[k] != result["settings"].get(k))
        parser.error(f"{place} was made with other settings ({', '.join(changed)}); choose another --out")
    missing = [seed for seed in range(options.seeds) if str(seed) not in result["seeds"]]
    if missing:
        model, data = load(options)
        if len(data["train"]) < options.seeds * options.sequences:
            parser.error(f"{options.run} has {len(data['train'])} training sequences, too few for the seeds; lower one")
        for seed in missing:
            result["seeds"][str(seed)] = run_seed(model, seed, data, options)
            write_json(place, result)
    rows = summary(result["seeds"])
    write_json(place, result | {"summary": rows})
    (options.out / "ablation.md").write_text(table(rows), encoding="utf-8")
    plot(rows, options.out / "ablation.png")
    print(table(rows))


if __name__ == "__main__":
    main()
