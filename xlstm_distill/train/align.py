"""Stage `align`: convert the teacher, then Stage I."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Align
from xlstm_distill.data.stream import Batch, SampleStream, read_samples
from xlstm_distill.model import HybridForCausalLM, convert
from xlstm_distill.objectives.align import LayerAlignment
from xlstm_distill.parallel.strategy import Strategy, make_strategy
from xlstm_distill.runtime.stop import StopFlag
from xlstm_distill.train import checkpoint
from xlstm_distill.train.gates import HeldOutGates, gate_facts
from xlstm_distill.train.loop import Task, held_out_share, micro_batches, train
from xlstm_distill.train.optim import make_optimizer
from xlstm_distill.train.students import (
    check_kernel,
    load_student,
    mixture,
    save_student,
    student_choices,
    token_folder,
)


class Alignment(Task):
    """All layers at once: one AdamW over every mixer's own parameters, each layer's gradient clipped by itself.

    The mixers are replicated in float32; only the frozen model is sharded. Per layer the loss is ‖h − ĥ‖²/‖h‖² over the
    global batch, so that one learning rate fits all layers.
    """

    def __init__(
        self, model: HybridForCausalLM, settings: Align, strategy: Strategy, validation: dict[str, Batch]
    ) -> None:
        self.model, self.settings, self.strategy, self.validation = model, settings, strategy, validation
        self.parameters = {name: p for name, p in model.mixer_parameters().items() if p.requires_grad}
        self.layers = [[p for p in m.parameters() if p.requires_grad] for m in model.mixers]
        self.objectives = [LayerAlignment(train=True) for _ in model.mixers]
        for mixer, objective in zip(model.mixers, self.objectives, strict=True):
            mixer.objective = objective
        self.optimizer = make_optimizer({settings.lr: self.parameters}, settings)

    def step(self, batch: Batch) -> dict[str, float]:
        """One step on this rank's share of the global batch."""
        self.optimizer.zero_grad()
        self._forward(((part, True) for part in micro_batches(batch, self.settings.micro_batch)), train=True)
        errors = self._reduce_gradients()
        for parameters in self.layers:
            nn.utils.clip_grad_norm_(parameters, self.settings.clip or float("inf"))
        self.optimizer.step()
        return {"loss": float(errors.mean()), "loss/worst_layer": float(errors.max())}

    def _forward(self, parts: Iterable[tuple[Batch, bool]], *, train: bool) -> None:
        """Sums over the parts that count."""
        for objective in self.objectives:
            objective.train = train
            objective.reset()
        for part, counts in parts:
            for objective in self.objectives:
                objective.counts = counts
            tokens = part.tokens[:, :-1].to(self.strategy.device)
            with torch.no_grad(), self.strategy.autocast():
                self.model(input_ids=tokens, document_ids=part.document[:, :-1].to(tokens.device), objective=_no_loss)

    def _reduce_gradients(self) -> Tensor:
        """Sum gradients, ‖h − ĥ‖² and ‖h‖² over ranks in one flat all-reduce, divide; relative error [layers]."""
        sums = self._sums()
        gradients = [p.grad for parameters in self.layers for p in parameters]
        flat = torch.cat([sums.flatten(), *(g.flatten() for g in gradients if g is not None)])
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

    def validate(self) -> dict[str, float]:
        """Relative error per layer, ‖h − ĥ‖²/‖h‖² over the held-out samples, which the ranks share."""
        totals = None
        gates = HeldOutGates(self.model)
        for batch in self.validation.values():
            with gates.recording():
                self._forward(held_out_share(batch, self.settings.micro_batch, self.strategy.world), train=False)
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
    """Convert and align. Output: `initial/` (untrained) and `student/` (aligned)."""
    config = folder.config
    strategy = make_strategy(config.strategy, world)
    initial = folder.output / "initial"
    if world.rank == 0 and not (initial.exists() and checkpoint.latest(folder.checkpoints)):
        make_initial(folder.input("fetch") / "teacher", initial, student_choices(config))
    strategy.barrier()
    model = load_student(initial, kernel=config.model.kernel)
    model.requires_grad_(False)
    new, idle = model.mixer_parameters(), model.idle_parameters()
    for name, parameter in new.items():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(name not in idle)
    strategy.prepare(model, replicated=new.values())
    check_kernel(model, strategy)
    tokens = token_folder(folder)
    stream = SampleStream(
        mixture(config.data.sources, tokens),
        batch=config.align.batch,
        seed=config.seed,
        rank=world.rank,
        world=world.size,
    )
    count = max(world.size, config.align.validation_samples // len(config.data.sources))
    validation = {name: read_samples(tokens / name / "validation", count) for name in config.data.sources}
    task = Alignment(model, config.align, strategy, validation)
    facts = train(task, stream, config.align, config.data.sequence, folder, strategy, stop)
    save_student(model, initial, folder.output / "student", strategy)
    facts |= alignment_facts(facts.pop("validation")) | gate_facts(task.gates)
    strategy.close()
    return facts


def make_initial(teacher: Path, destination: Path, choices: dict[str, Any]) -> None:
    """Convert `teacher` to the untrained student at `destination`, whole or not at all."""
    try:
        with folder_atomic(destination) as beside:
            convert(teacher, beside, **choices)
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
