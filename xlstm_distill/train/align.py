"""Stage `align`: convert the teacher, then Stage I."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import AdamW, Align
from xlstm_distill.data.shards import token_folder
from xlstm_distill.data.stream import Batch, SampleStream, read_samples
from xlstm_distill.model import HybridForCausalLM, convert, convert_distil
from xlstm_distill.objectives.align import LayerAlignment
from xlstm_distill.parallel.state import set_optimizer_step, training_state
from xlstm_distill.parallel.strategy import Read, Strategy, make_strategy
from xlstm_distill.runtime.clock import Clock
from xlstm_distill.runtime.stop import StopFlag
from xlstm_distill.train import checkpoint
from xlstm_distill.train.gates import HeldOutGates, gate_facts
from xlstm_distill.train.loop import Poll, Task, held_out_share, micro_batches, polled, train
from xlstm_distill.train.optim import make_optimizer
from xlstm_distill.train.students import (
    check_kernel,
    empty_student,
    flops_per_token,
    mixture,
    require_xlstm,
    save_student,
    student_choices,
)


class Alignment(Task):
    """All layers at once: one AdamW over every mixer's own parameters, each layer's gradient clipped by itself.

    The mixers are replicated in float32; only the frozen model is sharded. Per layer the loss is ‖h − ĥ‖²/‖h‖² over the
    global batch, so that one learning rate fits all layers.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        settings: Align,
        adamw: AdamW,
        strategy: Strategy,
        validation: dict[str, Batch],
    ) -> None:
        self.model, self.settings, self.strategy, self.validation = model, settings, strategy, validation
        self.parameters = {name: p for name, p in model.mixer_parameters().items() if p.requires_grad}
        self.layers = [[p for p in m.parameters() if p.requires_grad] for m in model.mixers]
        self.clock = Clock(strategy.device)
        self.objectives = [LayerAlignment(train=True, clock=self.clock) for _ in model.mixers]
        for mixer, objective in zip(model.mixers, self.objectives, strict=True):
            mixer.objective = objective
        self.optimizer = make_optimizer({settings.lr: self.parameters}, adamw)

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Relative error of each layer on the global batch, and its gradient; `grad_norm` is that of all layers."""
        settings = self.settings
        most = -(-settings.batch // self.strategy.world.size)
        self._forward(micro_batches(batch, settings.micro_batch, most), train=True)
        errors = self._reduce_gradients()
        self._norms = [nn.utils.get_total_norm([p.grad for p in layer if p.grad is not None]) for layer in self.layers]
        per_layer = {f"loss_layer/{n}": e for n, e in enumerate(errors.tolist())}
        norm = float(torch.stack(self._norms).norm())
        return {"loss": float(errors.mean()), "loss/worst_layer": float(errors.max()), "grad_norm": norm, **per_layer}

    def update(self) -> None:
        """Clip each layer's gradient by itself, one step of the optimiser."""
        if self.settings.clip:
            for layer, norm in zip(self.layers, self._norms, strict=True):
                nn.utils.clip_grads_with_norm_(layer, self.settings.clip, norm)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def training_state(self) -> dict[str, Tensor]:
        """The mixers are no matter of the strategy: plain tensors, the same on all ranks."""
        return training_state(self.parameters, self.optimizer)

    def load_training_state(self, read: Read, updates: int) -> None:
        """The reverse."""
        read(self.training_state())
        set_optimizer_step(self.optimizer, updates)

    def _forward(self, parts: Iterable[tuple[Batch, bool]], *, train: bool) -> None:
        """Sums over the parts that count."""
        for objective in self.objectives:
            objective.train = train
            objective.reset()
        for part, counts in parts:
            for objective in self.objectives:
                objective.counts = counts
            tokens = part.tokens[:, :-1].to(self.strategy.device)
            with self.clock("teacher"), torch.no_grad(), self.strategy.autocast():
                self.model(input_ids=tokens, document_ids=part.document[:, :-1].to(tokens.device), objective=_no_loss)

    def _reduce_gradients(self) -> Tensor:
        """Sum gradients, ‖h − ĥ‖² and ‖h‖² over ranks in one flat all-reduce, divide; relative error [layers]."""
        sums = self._sums()
        trained = [p for parameters in self.layers for p in parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([sums.flatten(), *(g.flatten() for g in gradients)])
        flat = self.strategy.sum(flat)
        errors, norms = flat[: sums.numel()].view_as(sums)
        offset = sums.numel()
        for norm, parameters in zip(norms, self.layers, strict=True):
            for parameter in parameters:
                size = parameter.numel()
                parameter.grad = (flat[offset : offset + size] / norm).view_as(parameter)
                offset += size
        return errors / norms

    def _sums(self) -> Tensor:
        errors = torch.stack([o.error for o in self.objectives if o.error is not None])
        norms = torch.stack([o.norm for o in self.objectives if o.norm is not None])
        return torch.stack([errors, norms])

    def validate(self, poll: Poll) -> dict[str, float]:
        """Relative error per layer, ‖h − ĥ‖²/‖h‖² over the held-out samples, which the ranks share."""
        totals = None
        gates = HeldOutGates(self.model)
        for batch in self.validation.values():
            with gates.recording():
                parts = held_out_share(batch, self.settings.micro_batch, self.strategy.world)
                self._forward(polled(parts, poll), train=False)
            sums = self._sums()
            totals = sums if totals is None else totals + sums
        assert totals is not None
        errors, norms = self.strategy.sum(totals)
        self.gates = gates.means(self.strategy)
        relative = (errors / norms).tolist()
        mean = sum(relative) / len(relative)
        return {"validation/error": mean, **{f"validation_layer/{n}": e for n, e in enumerate(relative)}}


def _no_loss(hidden: Tensor, head_weight: Tensor) -> Tensor:
    return hidden.new_zeros(())


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Convert and align. Output: `initial/` (untrained) and `student/` (aligned).

    No layer of a Distil-xLSTM stands for one of the teacher's: there is nothing to align, `student/` is its start.
    """
    config = folder.config
    if config.student.kind == "distil_xlstm":
        if world.rank == 0:
            require_xlstm()
            teacher, destination = folder.input("fetch") / "teacher", folder.output / "student"
            make_initial(teacher, destination, {"seed": config.seed}, convert_distil)
        return {}
    strategy = make_strategy(config.strategy, world, folder)
    initial = folder.output / "initial"
    if world.rank == 0 and not (initial.exists() and checkpoint.latest(folder.checkpoints)):
        teacher = folder.input("fetch") / "teacher"
        layers = json.loads((teacher / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        make_initial(teacher, initial, student_choices(config, layers))
    strategy.barrier()
    model = empty_student(initial, kernel=config.model.kernel)
    assert isinstance(model, HybridForCausalLM)
    model.requires_grad_(False)
    new, idle = model.mixer_parameters(), model.idle_parameters()
    strategy.prepare(model, initial, replicated=new.values())
    for name, parameter in new.items():
        parameter.requires_grad_(name not in idle)
    check_kernel(model, strategy)
    tokens = token_folder(folder)
    stream = SampleStream(
        mixture(config.data.sources, tokens),
        batch=config.align.batch,
        seed=config.seed,
        rank=world.rank,
        world=world.size,
    )
    count = max(1, config.align.validation_samples // len(config.data.sources))
    validation = {name: read_samples(tokens / name / "validation", count) for name in config.data.sources}
    task = Alignment(model, config.align, config.adamw, strategy, validation)
    task.flops = flops_per_token("align", model, config.data.sequence)
    facts = train(task, stream, config.align, folder, strategy, stop)
    save_student(model, initial, folder.output / "student", strategy)
    facts |= alignment_facts(facts.pop("validation")) | gate_facts(task.gates)
    strategy.close()
    return facts


def make_initial(
    teacher: Path, destination: Path, choices: dict[str, Any], write: Callable[..., object] = convert
) -> None:
    """Convert `teacher` to the untrained student at `destination`, whole or not at all."""
    try:
        with folder_atomic(destination) as beside:
            write(teacher, beside, **choices)
    except ValueError as error:
        raise Mistake(f"{teacher}: {error}") from error
    except FileNotFoundError as error:
        raise Mistake(f"{error}; fetch the teacher again") from error
    except OSError as error:
        shutil.rmtree(destination, ignore_errors=True)
        raise Mistake(f"{destination}: could not be written ({error})") from error


def alignment_facts(validation: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Relative errors per layer before and after."""
    layers = sum(name.startswith("validation_layer/") for name in validation["end"])
    errors = {when: [validation[when][f"validation_layer/{n}"] for n in range(layers)] for when in ("start", "end")}
    return {"error_before": errors["start"], "error_after": errors["end"]}
