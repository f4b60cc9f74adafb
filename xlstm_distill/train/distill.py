"""Stage `distill`: Stage II for one expert."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import AdamW, Distill
from xlstm_distill.data.stream import Batch, SampleStream, read_samples
from xlstm_distill.model import HybridForCausalLM
from xlstm_distill.objectives.distill import DistillationLoss, distillation_loss
from xlstm_distill.parallel.strategy import Strategy, make_strategy
from xlstm_distill.runtime.clock import Clock
from xlstm_distill.runtime.stop import StopFlag
from xlstm_distill.teacher.targets import TargetSource, make_target_source
from xlstm_distill.train.gates import HeldOutGates, gate_facts
from xlstm_distill.train.loop import Poll, Task, held_out_share, micro_batches, polled, train
from xlstm_distill.train.optim import make_optimizer
from xlstm_distill.train.students import (
    check_kernel,
    empty_student,
    flops_per_token,
    mixture,
    save_student,
    token_folder,
)


class Distillation(Task):
    """γ·CE + β·KL over all parameters; the loss runs inside the model's forward."""

    def __init__(
        self,
        model: HybridForCausalLM,
        targets: TargetSource,
        settings: Distill,
        adamw: AdamW,
        strategy: Strategy,
        validation: dict[str, Batch],
    ) -> None:
        self.model, self.targets, self.settings = model, targets, settings
        self.strategy, self.validation = strategy, validation
        idle = model.idle_parameters()
        self.parameters = {name: p for name, p in model.named_parameters() if name not in idle}
        mixers = {name: p for name, p in model.mixer_parameters().items() if name not in idle}
        inherited = {name: p for name, p in self.parameters.items() if name not in mixers}
        groups: dict[float, dict[str, nn.Parameter]] = {settings.lr: inherited}
        groups.setdefault(settings.mixer_lr or settings.lr, {}).update(mixers)
        self.optimizer = make_optimizer(groups, adamw)
        strategy.train(model, self.optimizer, settings.clip)
        self.clock = Clock(strategy.device)

    def gradients(self, batch: Batch) -> dict[str, float]:
        """CE, KL and loss over the valid tokens of the global batch, nats per token, and the gradient of the loss."""
        settings, strategy = self.settings, self.strategy
        sums = torch.zeros(2, device=strategy.device)
        count = self._global_count(batch)
        parts = list(micro_batches(batch, settings.micro_batch, -(-settings.batch // strategy.world.size)))
        for number, (part, counts) in enumerate(parts, 1):
            terms = self._forward(part, count, counts)
            with self.clock("backward"):
                strategy.backward(terms.loss, last=number == len(parts))
            sums += torch.stack([terms.ce, terms.kl]).detach()
        ce, kl = strategy.sum(sums).tolist()
        loss, self._norm = settings.gamma * ce + settings.beta * kl, strategy.norm()
        return {"loss": loss, "loss/ce": ce, "loss/kl": kl, "grad_norm": self._norm}

    def update(self) -> None:
        """Clip by the global norm, one step of the optimiser."""
        self.strategy.step(self._norm)

    def discard(self) -> None:
        """Drop the gradients."""
        self.strategy.discard()

    def _global_count(self, batch: Batch) -> Tensor:
        """Valid tokens of the global batch: what every rank divides its sums by."""
        return self.strategy.sum(batch.mask[:, 1:].sum().to(self.strategy.device, torch.float32)).clamp_min(1.0)

    def _forward(self, part: Batch, count: Tensor, counts: bool) -> DistillationLoss:
        """Sums over the part's valid tokens divided by `count`; zeros for a part that does not count."""
        part = part.to(self.strategy.device)
        inputs, labels = part.tokens[:, :-1], part.tokens[:, 1:]
        weights = part.mask[:, 1:].float() * counts / count
        with self.clock("teacher"):
            targets = self.targets(part)
        terms: list[DistillationLoss] = []

        def objective(hidden: Tensor, head_weight: Tensor) -> Tensor:
            settings = self.settings
            found = distillation_loss(
                hidden.flatten(0, 1),
                head_weight,
                labels.flatten(),
                weights.flatten(),
                targets,
                kind=settings.loss,
                gamma=settings.gamma,
                beta=settings.beta,
            )
            terms.append(found)
            return found.loss

        with self.clock("forward"), self.strategy.autocast():
            loss = self.model(input_ids=inputs, document_ids=part.document[:, :-1], objective=objective).loss
        return terms[0]._replace(loss=loss)

    @torch.no_grad()
    def validate(self, poll: Poll) -> dict[str, float]:
        """CE and KL (as the loss defines it) in nats per token, per source; the ranks share the samples."""
        values = {}
        gates = HeldOutGates(self.model)
        for name, batch in self.validation.items():
            world = self.strategy.world
            count = self._global_count(batch.rows(slice(world.rank, None, world.size)))
            sums = torch.zeros(2, device=self.strategy.device)
            for part, counts in polled(held_out_share(batch, self.settings.micro_batch, world), poll):
                with gates.recording(counts):
                    terms = self._forward(part, count, counts)
                sums += torch.stack([terms.ce, terms.kl])
            values[f"validation/{name}/ce"], values[f"validation/{name}/kl"] = self.strategy.sum(sums).tolist()
        self.gates = gates.means(self.strategy)
        return values


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Distil one expert. Output: `student/`."""
    config = folder.config
    strategy = make_strategy(config.strategy, world, folder)
    start = Path(config.student.init_from) if config.student.init_from else folder.input("align") / "student"
    model = empty_student(start, kernel=config.model.kernel)
    if model.config.reset_at_documents != config.student.reset_at_documents:
        raise Mistake(
            f"student.reset_at_documents={str(config.student.reset_at_documents).lower()}: the student in {start} was "
            f"made with {str(model.config.reset_at_documents).lower()}; give it as it was made"
        )
    if config.strategy.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.train()  # layers recompute in training mode only; nothing else in these models depends on it
    strategy.prepare(model, start)
    check_kernel(model, strategy)
    cached = config.distill.targets == "cached"
    shards = folder.input("cache") if cached else token_folder(folder)
    sources = config.expert[folder.job.expert].sources
    targets = make_target_source(config, folder, strategy, shards, list(sources))
    stream = SampleStream(
        mixture(sources, shards), batch=config.distill.batch, seed=config.seed, rank=world.rank, world=world.size
    )
    count = max(1, config.distill.validation_samples // len(sources))
    validation = {name: read_samples(shards / name / "validation", count) for name in sources}
    task = Distillation(model, targets, config.distill, config.adamw, strategy, validation)
    task.flops = flops_per_token("distill", model, config.data.sequence, online=not cached)
    facts = train(task, stream, config.distill, folder, strategy, stop)
    facts["validation"] = {when: _by_source(values) for when, values in facts["validation"].items()}
    facts |= gate_facts(task.gates)
    save_student(model, start, folder.output / "student", strategy)
    strategy.close()
    return facts


def _by_source(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """`validation/SOURCE/kl` → {SOURCE: {kl: …}}."""
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        _, source, number = name.split("/")
        found.setdefault(source, {})[number] = value
    return found
