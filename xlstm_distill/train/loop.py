"""The training loop, of Stage I and Stage II alike. A step is the task's: `train/align.py`, `train/distill.py`."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.flops import StepFlops
from xlstm_distill.contract.job import JobFolder, World, plain
from xlstm_distill.contract.schema import Training
from xlstm_distill.data.stream import Batch, SampleStream
from xlstm_distill.parallel.strategy import Read, Strategy
from xlstm_distill.runtime.clock import Clock
from xlstm_distill.runtime.guard import Guard
from xlstm_distill.runtime.measures import StepMeasures
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.pace import Pace
from xlstm_distill.runtime.stop import StopFlag
from xlstm_distill.runtime.watchdog import Watchdog
from xlstm_distill.train import checkpoint
from xlstm_distill.train.gates import log_gates
from xlstm_distill.train.optim import set_learning_rate

Poll = Callable[[str], None]
"""Called with the name of what comes next, at the same points on every rank; raises `Stopped` on all of them when any
was asked to stop."""


class Task(ABC):
    """A model with its objective. Everything here is collective."""

    strategy: Strategy
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    """What trains, by name."""
    flops: StepFlops
    """Per token of a step."""
    clock: Clock
    gates: Sequence[Sequence[float]] = ()
    """Mean output gate per layer and head of the last validation; empty for a student without a gate."""

    @abstractmethod
    def gradients(self, batch: Batch) -> dict[str, float]:
        """Gradients of this rank's share of a global batch; numbers of the whole batch, `loss` and `grad_norm` among
        them, the same on every rank."""

    @abstractmethod
    def update(self) -> None:
        """Clip the gradients, step the optimiser."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients."""

    @abstractmethod
    def validate(self, poll: Poll) -> dict[str, float]:
        """Numbers on the held-out samples; sets `gates`. Polls before each forward."""

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: see `parallel/state.py`."""
        return self.strategy.training_state(self.parameters)

    def load_training_state(self, read: Read, updates: int) -> None:
        """Go on from a checkpoint, which `read` puts into tensors, made after so many updates."""
        self.strategy.load_training_state(self.parameters, read, updates)


@dataclass
class Progress:
    """Where a training stands."""

    steps: int
    done: int = 0
    """Steps made, of `steps`."""
    resumed: bool = False
    validations: dict[str, dict[str, float]] = field(default_factory=dict)
    """By `start`, the step, or `end`."""

    def validation_due(self, every: int) -> str:
        """Name of the validation that belongs here and was not made; empty: none."""
        if self.done in (0, self.steps):
            name = "start" if self.done == 0 else "end"
        else:
            name = str(self.done) if every and self.done % every == 0 else ""
        return "" if name in self.validations else name


def train(
    task: Task, stream: SampleStream, settings: Training, folder: JobFolder, strategy: Strategy, stop: StopFlag
) -> dict[str, Any]:
    """Train until the token budget is consumed; resumes from the job's newest checkpoint.

    Args:
        task: what a step does.
        stream: this rank's share of each global batch; its position is part of the checkpoint.
        settings: budget, batch, schedule, cadence of validation and checkpoints.
        folder: the job's folder.
        strategy: how the step is spread.
        stop: asked at every step and inside validations, on all ranks together.

    Returns:
        Facts for the manifest: steps, tokens, tokens_per_s (of this process), validation at start and end.

    Raises:
        Stopped: a stop was requested; a checkpoint is durable.
        Mistake: the checkpoint is of other settings, or cannot be written; too many steps in a row were sick.
    """
    sequence, lead = folder.config.data.sequence, strategy.world.rank == 0
    at = Progress(max(1, settings.tokens // (settings.batch * sequence)))
    guard, pace, clock = Guard(folder.config.guard), Pace(strategy.world), task.clock
    saver = checkpoint.Checkpoints(folder.checkpoints, folder.config.guard.keep, folder.config.guard.keep_every)
    _resume(at, guard, task, stream, folder)
    first, saved, started = at.done, at.done if at.resumed else -1, time.monotonic()
    values: dict[str, float] = {}

    def save() -> None:
        nonlocal saved
        if saved != at.done:  # a stop right after a checkpoint: replacing it would leave a moment without one
            saved = at.done
            with clock("checkpoint"):
                saver.save(at.done, task.training_state(), _state(at, guard, task, stream, folder))

    def poll(phase: str) -> None:
        watchdog.beat(at.done, phase)
        if stop.requested(saver.failed):
            saver.wait()  # tells on all ranks together of what failed on one
            raise Stopped(phase)

    resume_at = at.done if at.resumed else -1
    with (
        Metrics(folder.path, at.steps, resume_at=resume_at, enabled=lead, tensorboard=True) as metrics,
        Watchdog(folder.path, strategy.world, folder.config.guard.stuck_seconds) as watchdog,
    ):
        measures = StepMeasures(folder, strategy.world, task.flops, strategy.device, metrics, at.done)
        clock.take()  # what came before belongs to no step
        try:
            while True:
                if due := at.validation_due(settings.validate_every):
                    with clock("validation"):
                        at.validations[due] = measured = task.validate(poll)
                        values |= measured | log_gates(metrics, at.done, task.gates)
                if values:
                    metrics.log(at.done, values)
                    values = {}
                if at.done == at.steps:
                    break
                if at.done % settings.checkpoint_every == 0 and at.done > first:
                    save()
                poll("data")
                began, used = time.monotonic(), time.process_time()
                with clock("data"):
                    batch = next(stream)
                waited = time.monotonic() - began
                watchdog.beat(at.done, "step")
                values = {"lr": set_learning_rate(task.optimizer, at.done, at.steps, settings)}
                values |= task.gradients(batch)
                if reason := guard.judge(values):
                    task.discard()
                    print(guard.report(at.done + 1, reason, lambda: stream.describe(at.done)), flush=True)
                else:
                    with clock("optimizer"):
                        task.update()
                at.done += 1
                values |= {"skipped": guard.skipped} | measures.record(at.done, settings.batch * sequence, clock)
                stop.expect(2 * (time.monotonic() - began) + saver.last_seconds)
                if slow := pace.step(waited, time.process_time() - used if strategy.device.type == "cpu" else 0.0):
                    print(f"step {at.done}: {slow}", flush=True)
                values["pace/slowest"] = pace.slowest
        except Stopped as stopped:
            if values:  # of the step before the validation that was broken off
                metrics.log(at.done, values)
            save()
            saver.wait()
            line = f"{folder.job.name}: stopped at step {at.done} of {at.steps}; launch again to go on"
            raise Stopped(line) from stopped
        except Mistake:  # on all ranks together
            with suppress(Mistake):
                saver.wait()
            raise
        save()
        saver.wait()
        measures.end(at.done)
    seconds = max(time.monotonic() - started, 1e-9)
    return {
        "steps": at.steps,
        "tokens": at.steps * settings.batch * sequence,
        "tokens_per_s": round((at.done - first) * settings.batch * sequence / seconds, 1),
        "skipped": guard.skipped,
        "validation": {"start": at.validations["start"], "end": at.validations["end"]},
    }


def _state(at: Progress, guard: Guard, task: Task, stream: SampleStream, folder: JobFolder) -> dict[str, Any]:
    """What a checkpoint says besides tensors."""
    return {
        "updates": at.done - guard.skipped,
        "stream": stream.state_dict(),
        "validations": at.validations,
        "gates": task.gates,
        "guard": guard.state_dict(),
        "identity": dict(folder.job.identity),
    }


def _resume(at: Progress, guard: Guard, task: Task, stream: SampleStream, folder: JobFolder) -> None:
    """Take everything from the newest checkpoint, if there is one.

    Raises:
        Mistake: the checkpoint is of other settings, or beyond the steps of this budget.
    """
    newest = checkpoint.latest(folder.checkpoints)
    if newest is None:
        return
    state = checkpoint.read_state(newest)
    _check_fits(newest, state["identity"], folder)
    at.done, at.validations, at.resumed, task.gates = int(state["step"]), state["validations"], True, state["gates"]
    if at.done > at.steps:
        raise Mistake(
            f"{folder.job.name}: its checkpoint is at step {at.done}, beyond the {at.steps} steps of this token "
            f"budget; give the larger {folder.job.stage}.tokens again, or use another --name"
        )
    if at.done < at.steps and "end" in at.validations:  # a larger budget: that was not the end
        at.validations[str(at.done)] = at.validations.pop("end")
    task.load_training_state(lambda tensors: checkpoint.load(newest, tensors), int(state["updates"]))
    stream.load_state_dict(state["stream"])
    guard.load_state_dict(state["guard"])


def _check_fits(newest: Path, saved: Mapping[str, Any], folder: JobFolder) -> None:
    for key, value in plain(folder.job.identity).items():
        if saved.get(key) != value:
            raise Mistake(f"{newest}: made with {key}={saved.get(key)}, this job has {value}; use another --name")


def micro_batches(batch: Batch, size: int, most: int, spare: Batch | None = None) -> Iterator[tuple[Batch, bool]]:
    """A rank's samples in parts of `size`, and whether a part counts.

    Every rank gets as many parts: a forward of sharded parameters is collective, and a rank that ran one fewer would
    leave the others waiting. Those that do not count repeat one sample.

    Args:
        batch: this rank's samples.
        size: samples per forward.
        most: samples of the rank that has most.
        spare: what to repeat; default: the rank's first sample.
    """
    mine = range(0, len(batch.tokens), size)
    yield from ((batch.rows(slice(start, start + size)), True) for start in mine)
    for _ in range(-(-most // size) - len(mine)):
        yield spare or batch.rows(slice(0, 1)), False


def held_out_share(batch: Batch, size: int, world: World) -> Iterator[tuple[Batch, bool]]:
    """This rank's `micro_batches` of held-out samples, of which every rank has the whole."""
    mine, most = batch.rows(slice(world.rank, None, world.size)), -(-len(batch.tokens) // world.size)
    return micro_batches(mine, size, most, spare=batch.rows(slice(0, 1)))


def polled(parts: Iterable[tuple[Batch, bool]], poll: Poll) -> Iterator[tuple[Batch, bool]]:
    """The same parts of a validation; `poll` before each."""
    for part in parts:
        poll("validation")
        yield part
