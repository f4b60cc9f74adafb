"""The memory that `xdl plan` foretells, against what torch allocates: `python benchmarks/plan.py [--large]`.

A step of Stage I or Stage II runs under a dispatch mode that sees every tensor come and go. Some run with real tensors
on the CPU, the others under torch's fake tensors, which have sizes but no memory, on a fake process group: the code of
the stages, with FSDP2 as rank 0 of any number of ranks. The table has the same shape both ways: they agree. `--large`
adds Llama-3.1-8B on 8 ranks (10 minutes).
"""

import argparse
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from launcher.activations import Setting, setting_of
from launcher.memory import moments
from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import (
    Align,
    Cache,
    Config,
    Data,
    Distill,
    Model,
    Student,
    Teacher,
)
from xlstm_distill.contract.schema import (
    Strategy as Spread,
)
from xlstm_distill.data.stream import Batch
from xlstm_distill.model import HybridConfig, HybridForCausalLM
from xlstm_distill.parallel.fsdp import FullySharded
from xlstm_distill.parallel.group import make_mesh
from xlstm_distill.parallel.strategy import Strategy
from xlstm_distill.teacher.targets import cached_targets
from xlstm_distill.train.align import Alignment
from xlstm_distill.train.distill import Distillation

COPIES_INSIDE = {torch.ops.aten.logsumexp.default}
"""Operations that copy their first argument where no dispatch mode sees it (ATen's logsumexp: exp of x − max)."""
SMALL = Teacher(
    "small", "llama", "folder", "x", num_hidden_layers=4, hidden_size=512, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, intermediate_size=1536, vocab_size=4000, max_position_embeddings=8192,
)  # fmt: skip
LLAMA_8B = replace(
    SMALL, num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    intermediate_size=14336, vocab_size=128256,
)  # fmt: skip


class Live(TorchDispatchMode):
    """Bytes of all tensors that live, and the most since `mark`; a storage counts once, whatever views it has."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def mark(self) -> None:
        """Forget the most so far."""
        self.most = self.now

    def see(self, value: object) -> None:
        """Count a tensor that was there before."""
        if isinstance(value, Tensor):
            storage = (value.to_local() if isinstance(value, DTensor) else value).untyped_storage()
            if id(storage) not in self._sizes:
                weakref.finalize(storage, self._set, id(storage), None)
            self._set(id(storage), storage.nbytes())

    def _set(self, key: int, size: int | None) -> None:
        self.now += (size or 0) - self._sizes.pop(key, 0)
        if size is not None:
            self._sizes[key] = size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls again with its parts
        if func in COPIES_INSIDE:
            self.most = max(self.most, self.now + args[0].nbytes)
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            self.see(value)
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count, the changes of size by which FSDP2 frees what it gathered included."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._sizes:
                self._set(id(storage), storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        try:
            with self:
                yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def make_strategy(setting: Setting) -> Strategy:
    """The setting's strategy; of more ranks than one as rank 0 of a process group whose collectives do nothing."""
    world = World(0, setting.ranks)
    if not setting.sharded:
        return Strategy(setting.config.strategy, world)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setting.ranks)
    strategy = object.__new__(FullySharded)  # its own way to a process group is left out
    Strategy.__init__(strategy, setting.config.strategy, world)
    strategy.mesh, strategy.loss_factor = make_mesh(strategy.device, world, "all"), float(setting.ranks)
    return strategy


def make_model(config: Config) -> HybridForCausalLM:
    """A student of the configuration's shape, with parameters of no meaning."""
    names = (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    base = AutoConfig.for_model(config.teacher.family, **{name: getattr(config.teacher, name) for name in names})
    choices = {name: value for name, value in vars(config.student).items() if name != "init_from"}
    return HybridForCausalLM(HybridConfig(base, kernel=config.model.kernel, **choices)).eval()


def make_batch(config: Config, samples: int) -> Batch:
    """Samples of no meaning, with targets."""
    length, k = config.data.sequence, config.cache.top_k
    tokens = torch.randint(0, config.teacher.vocab_size, (samples, length + 1))
    targets = (
        torch.zeros(samples, length, k, dtype=torch.int64),
        torch.full((samples, length, k), -3.0),
        torch.full((samples, length), -1.0),
    )
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens), targets)


def measure(setting: Setting, *, fake: bool) -> dict[str, float]:
    """Bytes of one rank in the second step: by part, and `peak` of them all together.

    Args:
        setting: as `launcher.memory.setting_of` makes it.
        fake: under fake tensors.
    """
    config = setting.config
    torch.manual_seed(0)
    try:
        strategy = make_strategy(setting)
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            model = make_model(config)
            run = _align if setting.stage == "align" else _distill
            return run(setting, strategy, model)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _distill(setting: Setting, strategy: Strategy, model: HybridForCausalLM) -> dict[str, float]:
    config = setting.config
    if config.strategy.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    strategy._shard(model, set())
    task = Distillation(model, cached_targets, replace(config.distill, loss=config.loss), config.adamw, strategy, {})
    batch = make_batch(config, setting.micro)
    count, live = torch.ones(()), Live()
    for tensor in (*model.parameters(), batch.tokens, batch.mask, batch.document, *(batch.targets or ())):
        live.see(tensor)
    found: dict[str, float] = {"weights": _bytes(model.parameters())}
    inside: dict[str, float] = {}
    forward = model.forward

    def watched(*args: Any, objective: Any, **kwargs: Any) -> Any:
        def between(hidden: Tensor, head: Tensor) -> Tensor:
            inside["now"] = live.now
            inside["most"] = max(inside.get("most", 0), live.most)
            live.mark()
            loss = objective(hidden, head)
            inside["logits"] = live.most - inside["now"]
            return loss

        return forward(*args, objective=between, **kwargs)

    model.forward = watched  # type: ignore[method-assign]
    with live.watching():
        for _ in range(2):
            inside["most"] = 0
            live.mark()
            for _ in range(1 + setting.accumulates):
                terms = task._forward(batch, count, True)
                strategy.backward(terms.loss, last=True)
                del terms
            found["gradients"] = _bytes(p.grad for p in task.parameters.values() if p.grad is not None)
            task.optimizer.step()
            task.optimizer.zero_grad()
    found["optimizer"] = _bytes(v for own in task.optimizer.state.values() for v in own.values())
    steady = live.now + found["gradients"] * setting.accumulates
    return found | {
        "peak": max(inside["most"], live.most),
        "activations": inside["now"] - steady,
        "logits": inside["logits"],
    }


def _align(setting: Setting, strategy: Strategy, model: HybridForCausalLM) -> dict[str, float]:
    config = setting.config
    model.requires_grad_(False)
    new, idle = model.mixer_parameters(), model.idle_parameters()
    strategy._shard(model, set(new.values()))
    for name, parameter in new.items():
        parameter.requires_grad_(name not in idle)
    task = Alignment(model, config.align, config.adamw, strategy, {})
    batch, live = make_batch(config, setting.micro), Live()
    for tensor in (*model.parameters(), batch.tokens, batch.mask, batch.document):
        live.see(tensor)
    found: dict[str, float] = {"weights": _bytes(model.parameters())}
    with live.watching():
        for _ in range(2):
            live.mark()
            task._forward([(batch, True)] * (1 + setting.accumulates), train=True)
            found["gradients"] = _bytes(p.grad for p in task.parameters.values() if p.grad is not None)
            forward = live.most
            task._reduce_gradients()
            task.optimizer.step()
            task.optimizer.zero_grad()
            found["peak"] = live.most
    found["optimizer"] = _bytes(v for own in task.optimizer.state.values() for v in own.values())
    steady = sum(found[part] for part in ("weights", "gradients", "optimizer")) + _bytes(
        (batch.tokens, batch.mask, batch.document)
    )
    return found | {"activations": forward - steady}


def _bytes(tensors: Any) -> float:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return float(sum(t.nbytes for t in local))


def foretold(setting: Setting) -> dict[str, float]:
    """The same by the formulas; `copies` of checkpoints are not in a step."""
    found = {name: replace(memory, copies=0.0) for name, memory in moments(setting).items()}
    highest = max(found.values(), key=lambda memory: memory.total)
    steady, update = next(iter(found.values())), found["update"]
    parts = {"weights": steady.weights, "optimizer": steady.optimizer, "peak": highest.total}
    if setting.stage == "align":
        layer = found["layer"]
        return parts | {"gradients": layer.gradients, "activations": layer.activations + layer.gathered}
    loss = found["loss"]
    return parts | {
        "gradients": update.gradients,
        "activations": loss.activations + loss.gathered,
        "logits": loss.logits,
    }


def case(stage: str, teacher: Teacher = SMALL, ranks: int = 1, **changes: Any) -> Setting:
    """A setting: `precision`, `checkpointing`, `sequence`, `micro_batch`, `accumulate`, `kernel`, and the student's."""
    accumulate = changes.pop("accumulate", 1)
    micro = changes.pop("micro_batch", 1)
    training = {"tokens": 1 << 20, "batch": ranks * micro * accumulate, "micro_batch": micro}
    spread = Spread(
        precision=changes.pop("precision", "float32"), activation_checkpointing=changes.pop("checkpointing", False)
    )
    config = Config(
        teacher=teacher,
        data=Data(sequence=changes.pop("sequence", 512)),
        cache=Cache(top_k=changes.pop("top_k", 8)),
        model=Model(kernel=changes.pop("kernel", "auto")),
        align=Align(**training),
        distill=Distill(**training),
        strategy=spread,
        student=Student(**{"window": 64, **changes}),
    )
    return setting_of(config, stage, 1, ranks) if ranks > 1 else setting_of(config, stage, 1, 0)


def cases(large: bool) -> Iterator[tuple[str, Setting, bool]]:
    """What it is, the setting, whether fake."""
    wide = replace(SMALL, vocab_size=32000)
    deep = replace(
        SMALL, num_hidden_layers=8, hidden_size=768, intermediate_size=2048, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=2000,
    )  # fmt: skip
    for precision in ("float32", "bfloat16"):
        for checkpointing in (False, True):
            name = f"II {precision}{' recomputed' if checkpointing else ''}"
            settings: dict[str, Any] = {"precision": precision, "checkpointing": checkpointing}
            yield f"{name}, real tensors", case("distill", **settings), False
            yield name, case("distill", **settings), True
            yield (
                f"{name}, V 32000, 2 × 256, 2 parts",
                case("distill", wide, micro_batch=2, accumulate=2, sequence=256, **settings),
                True,
            )
            yield f"{name}, 8 ranks, 2 parts", case("distill", ranks=8, accumulate=2, **settings), True
            yield (
                f"{name}, 8 × 768, 2 × 1024, 4 ranks",
                case("distill", deep, ranks=4, micro_batch=2, sequence=1024, **settings),
                True,
            )
        yield f"I {precision}, real tensors", case("align", precision=precision), False
        yield (
            f"I {precision}, 8 × 768, 2 × 1024",
            case("align", deep, precision=precision, micro_batch=2, sequence=1024),
            True,
        )
        yield f"I {precision}, V 32000, 8 ranks", case("align", wide, precision=precision, ranks=8), True
    choices: tuple[dict[str, Any], ...] = (
        {"feature_map": "hedgehog"}, {"use_window": False}, {"gate_input": "hidden"}, {"feature_rope": "after"},
    )  # fmt: skip
    for choice in choices:
        yield f"II {next(iter(choice.items()))}", case("distill", **choice), True
    if large:
        llama = {"precision": "bfloat16", "sequence": 4096, "top_k": 256, "window": 512, "ranks": 8}
        yield "I Llama-3.1-8B, 8 ranks", case("align", LLAMA_8B, **llama), True
        yield (
            "II Llama-3.1-8B recomputed, 8 ranks",
            case("distill", LLAMA_8B, accumulate=8, checkpointing=True, **llama),
            True,
        )


def main() -> None:
    """Print the table: measured megabytes, and foretold ÷ measured in brackets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="Llama-3.1-8B too")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    given = parser.parse_args()
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "peak")
    print(f"{'MB measured (foretold ÷ measured)':<46}" + "".join(f"{part:>18}" for part in parts))
    worst = 1.0
    for name, setting, fake in cases(given.large):
        if given.only not in name:
            continue
        measured, formula = measure(setting, fake=fake), foretold(setting)
        cells = [_cell(measured.get(part, 0.0), formula.get(part, 0.0)) for part in parts]
        ratios = [formula[p] / measured[p] for p in parts if measured.get(p)]
        worst = max([worst, *(max(r, 1 / r) for r in ratios)])
        print(f"{name:<46}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    print(f"farthest: {100 * (worst - 1):.0f} %")


def _cell(measured: float, formula: float) -> str:
    return f"{measured / 1e6:.1f} ({formula / measured:.2f})" if measured else ""


if __name__ == "__main__":
    main()
