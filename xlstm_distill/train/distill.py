"""Stage `distill`: Stage II for one expert."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import AdamW, Distill
from xlstm_distill.data.shards import token_folder
from xlstm_distill.data.stream import Batch, SampleStream, read_samples
from xlstm_distill.model import StudentForCausalLM
from xlstm_distill.objectives.distil_xlstm import DistilXLSTMLoss, Weights, annealed, distil_xlstm_loss
from xlstm_distill.objectives.distill import DenseTargets, DistillationLoss, Targets, distillation_loss
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
    weight_hashes,
)


class Distillation(Task):
    """γ·CE + β·KL over all parameters; the loss runs inside the model's forward."""

    terms: tuple[str, ...] = ("ce", "kl")
    """Of the loss, as `loss` names them."""

    def __init__(
        self,
        model: StudentForCausalLM,
        targets: TargetSource,
        settings: Distill,
        adamw: AdamW,
        strategy: Strategy,
        validation: dict[str, Batch],
        vocabulary: int = 0,
    ) -> None:
        """`vocabulary`: rows of the LM head that are tokens of the teacher; 0: all."""
        if settings.loss == "auto":
            raise ValueError("distill.loss=auto: settle it first (Config.loss)")
        self.vocabulary, self.kind = vocabulary, settings.loss
        self.model, self.targets, self.settings = model, targets, settings
        self.strategy, self.validation = strategy, validation
        self.parameters = model.trained_parameters()
        mixers = {name: p for name, p in model.mixer_parameters().items() if name in self.parameters}
        inherited = {name: p for name, p in self.parameters.items() if name not in mixers}
        groups: dict[float, dict[str, nn.Parameter]] = {settings.lr: inherited}
        groups.setdefault(settings.mixer_lr or settings.lr, {}).update(mixers)
        self.optimizer = make_optimizer(groups, adamw)
        strategy.train(model, self.optimizer, settings.clip)
        self.clock = Clock(strategy.device)

    def gradients(self, batch: Batch) -> dict[str, float]:
        """The loss and its terms over the valid tokens of the global batch, nats per token, and the gradient."""
        settings, strategy = self.settings, self.strategy
        sums = torch.zeros(len(self.terms), device=strategy.device)
        count = self._global_count(batch)
        parts = list(micro_batches(batch, settings.micro_batch, -(-settings.batch // strategy.world.size)))
        for number, (part, counts) in enumerate(parts, 1):
            terms = self._forward(part, count, counts)
            with self.clock("backward"):
                strategy.backward(terms.loss, last=number == len(parts))
            sums += self._stacked(terms).detach()
        values = dict(zip(self.terms, strategy.sum(sums).tolist(), strict=True))
        loss, self._norm = sum(self.weights()[name] * value for name, value in values.items()), strategy.norm()
        return {"loss": loss, **{f"loss/{name}": v for name, v in values.items()}, "grad_norm": self._norm}

    def weights(self) -> dict[str, float]:
        """Of the terms of the loss."""
        return {"ce": self.settings.gamma, "kl": self.settings.beta}

    def loss(
        self, hidden: Tensor, head_weight: Tensor, labels: Tensor, weights: Tensor, targets: Targets
    ) -> DistillationLoss | DistilXLSTMLoss:
        """Of hidden states [B, T, H] and labels [B, T], whose weights [B, T] are mask over global count."""
        settings = self.settings
        return distillation_loss(
            hidden.flatten(0, 1),
            head_weight,
            labels.flatten(),
            weights.flatten(),
            targets,
            kind=self.kind,
            gamma=settings.gamma,
            beta=settings.beta,
            divergence=settings.divergence,
            temperature=settings.temperature,
            soft_cap=self.model.soft_cap,
            vocabulary=self.vocabulary,
        )

    def _stacked(self, found: DistillationLoss | DistilXLSTMLoss) -> Tensor:
        return torch.stack([getattr(found, name) for name in self.terms])

    def update(self) -> None:
        """Clip by the global norm, one step of the optimiser."""
        self.strategy.step(self._norm)

    def discard(self) -> None:
        """Drop the gradients."""
        self.strategy.discard()

    def _global_count(self, batch: Batch) -> Tensor:
        """Valid tokens of the global batch: what every rank divides its sums by."""
        return self.strategy.sum(batch.mask[:, 1:].sum().to(self.strategy.device, torch.float32)).clamp_min(1.0)

    def _forward(self, part: Batch, count: Tensor, counts: bool) -> DistillationLoss | DistilXLSTMLoss:
        """Sums over the part's valid tokens divided by `count`; zeros for a part that does not count."""
        part = part.to(self.strategy.device)
        inputs, labels = part.tokens[:, :-1], part.tokens[:, 1:]
        weights = part.mask[:, 1:].float() * counts / count
        with self.clock("teacher"):
            targets = self.targets(part)
        terms: list[DistillationLoss | DistilXLSTMLoss] = []

        def objective(hidden: Tensor, head_weight: Tensor) -> Tensor:
            terms.append(self.loss(hidden, head_weight, labels, weights, targets))
            return terms[0].loss

        with self.clock("forward"), self.strategy.autocast():
            loss = self.model(input_ids=inputs, document_ids=part.document[:, :-1], objective=objective).loss
        return terms[0]._replace(loss=loss)

    @torch.no_grad()
    def validate(self, poll: Poll) -> dict[str, float]:
        """The terms (as the loss defines them) in nats per token, per source; the ranks share the samples."""
        values: dict[str, float] = {}
        gates = HeldOutGates(self.model)
        for name, batch in self.validation.items():
            world = self.strategy.world
            count = self._global_count(batch.rows(slice(world.rank, None, world.size)))
            sums = torch.zeros(len(self.terms), device=self.strategy.device)
            for part, counts in polled(held_out_share(batch, self.settings.micro_batch, world), poll):
                with gates.recording(counts):
                    terms = self._forward(part, count, counts)
                sums += self._stacked(terms)
            found = zip(self.terms, self.strategy.sum(sums).tolist(), strict=True)
            values |= {f"validation/{name}/{term}": value for term, value in found}
        self.gates = gates.means(self.strategy)
        return values


class AnnealedDistillation(Distillation):
    """Distil-xLSTM's: weights and temperature fall step by step, and hidden states count (`objectives/distil_xlstm`).

    Validations take the weights and the temperature that these tend to, so that their numbers can be compared.
    """

    terms = ("ce", "kl", "hidden")
    step: float = 0

    def begin(self, step: int) -> None:
        """Take the weights and the temperature of this step."""
        self.step = step

    def at(self) -> Weights:
        """Weights and temperature now."""
        s = self.settings
        beta = annealed(s.beta, s.beta_end, self.step)
        return Weights(s.gamma + s.beta - beta, beta, s.hidden, annealed(s.temperature, s.temperature_end, self.step))

    def weights(self) -> dict[str, float]:
        """Of the terms of the loss."""
        return {"ce": self.at().gamma, "kl": self.at().beta, "hidden": self.at().hidden}

    def loss(
        self, hidden: Tensor, head_weight: Tensor, labels: Tensor, weights: Tensor, targets: Targets
    ) -> DistilXLSTMLoss:
        """As `Distillation.loss`, with the terms of `distil_xlstm_loss`."""
        assert isinstance(targets, DenseTargets)
        cap, known = self.model.soft_cap, self.vocabulary
        at = self.at()
        return distil_xlstm_loss(hidden, head_weight, labels, weights, targets, at, soft_cap=cap, vocabulary=known)

    def gradients(self, batch: Batch) -> dict[str, float]:
        """As `Distillation.gradients`, with where the weights and the temperature stand."""
        at = self.at()
        return super().gradients(batch) | {"anneal/beta": at.beta, "anneal/temperature": at.temperature}

    def validate(self, poll: Poll) -> dict[str, float]:
        """As `Distillation.validate`."""
        self.step = math.inf
        return super().validate(poll)


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
    if model.config.kind != config.student.kind:
        raise Mistake(f"student.kind={config.student.kind}: the student in {start} is a {model.config.kind}")
    if config.strategy.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.train()  # layers recompute in training mode only; nothing else in these models depends on it
    # A folder of the user's has no manifest: merge compares what the experts began with.
    began = {"started_from": weight_hashes(start)} if config.student.init_from and world.rank == 0 else {}
    strategy.prepare(model, start)
    check_kernel(model, strategy)
    settings, cached = config.distill_of(folder.job.expert), config.distill.targets == "cached"
    shards = folder.input("cache") if cached else token_folder(folder)
    sources = config.expert[folder.job.expert].sources
    targets = make_target_source(config, folder, strategy, shards, list(sources))
    stream = SampleStream(
        mixture(sources, shards), batch=settings.batch, seed=config.seed, rank=world.rank, world=world.size
    )
    count = max(1, settings.validation_samples // len(sources))
    validation = {name: read_samples(shards / name / "validation", count) for name in sources}
    vocabulary = config.teacher.vocab_size
    kind = AnnealedDistillation if config.student.kind == "distil_xlstm" else Distillation
    task = kind(model, targets, settings, config.adamw, strategy, validation, vocabulary)
    task.flops = flops_per_token("distill", model, config.data.sequence, online=not cached)
    facts = train(task, stream, settings, folder, strategy, stop)
    facts["validation"] = {when: _by_source(values) for when, values in facts["validation"].items()}
    facts |= gate_facts(task.gates) | began
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
