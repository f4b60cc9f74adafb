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
from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.flops import StepFlops
from xlstm_distill.contract.job import STOP_SECONDS, JobFolder, World, plain
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

    def begin(self, step: int) -> None:  # noqa: B027
        """Hear the number of the step that `gradients` comes to, from 0."""

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
    run = _Run(task, stream, settings, folder, strategy, stop)
    at, first, started = run.at, run.at.done, time.monotonic()
    values: dict[str, float] = {}
    with run.watchdog, run.metrics:
        run.begin()
        try:
            while True:
                if due := at.validation_due(settings.validate_every):
                    values |= run.validate(due)
                if values:
                    run.metrics.log(at.done, values)
                    values = {}
                if at.done == at.steps:
                    break
                if at.done % settings.checkpoint_every == 0 and at.done > first:
                    run.save()
                run.poll("data")
                values = run.step()
        except Stopped as stopped:
            if values:  # of the step before the validation that was broken off
                run.metrics.log(at.done, values)
            run.save()
            run.saver.wait()
            line = f"{folder.job.name}: stopped at step {at.done} of {at.steps}; launch again to go on"
            raise Stopped(line) from stopped
        except Mistake:
            with suppress(Exception):  # a save that is nearly durable; what there is to tell is the mistake
                run.saver.wait()
            raise
        run.save()
        run.saver.wait()
        run.measures.end(at.done)
    seconds = max(time.monotonic() - started, 1e-9)
    return {
        "steps": at.steps,
        "tokens": at.steps * run.tokens,
        "tokens_per_s": round((at.done - first) * run.tokens / seconds, 1),
        "skipped": run.guard.skipped,
        "validation": {"start": at.validations["start"], "end": at.validations["end"]},
    }


class _Run:
    """What `train` is made of: each method is one line of its loop."""

    measures: StepMeasures

    def __init__(
        self,
        task: Task,
        stream: SampleStream,
        settings: Training,
        folder: JobFolder,
        strategy: Strategy,
        stop: StopFlag,
    ) -> None:
        self.task, self.stream, self.settings, self.folder, self.strategy = task, stream, settings, folder, strategy
        self.stop, limits, world = stop, folder.config.guard, strategy.world
        self.tokens = settings.batch * folder.config.data.sequence
        """Of a step."""
        self.at = Progress(max(1, settings.tokens // self.tokens))
        self.guard, self.pace, self.clock = Guard(limits), Pace(world), task.clock
        self.saver = checkpoint.Checkpoints(folder.checkpoints, limits.keep, limits.keep_every)
        self.resume()
        resume_at = self.at.done if self.at.resumed else -1
        self.saved = resume_at
        self.metrics = Metrics(
            folder.path, self.at.steps, resume_at=resume_at, enabled=world.rank == 0, tensorboard=True
        )
        self.watchdog = Watchdog(folder.path, world, limits.stuck_seconds)
        self.saver.waiting = lambda: self.watchdog.beat(self.at.done, "checkpoint", checkpoint.LONGEST_SECONDS)

    def begin(self) -> None:
        """Enter the start in the ledger; what came before belongs to no step."""
        world, device = self.strategy.world, self.strategy.device
        self.measures = StepMeasures(self.folder, world, self.task.flops, device, self.metrics, self.at.done)
        self.clock.take()

    def poll(self, phase: str) -> None:
        """Say what comes next, and ask whether any rank was told to stop, or a save has failed on one."""
        self.watchdog.beat(self.at.done, phase)
        if self.stop.requested(self.saver.failed):
            self.saver.wait()  # tells on all ranks together of what failed on one
            raise Stopped(phase)

    def validate(self, due: str) -> dict[str, float]:
        """The validation of this name."""
        with self.clock("validation"):
            self.at.validations[due] = measured = self.task.validate(self.poll)
            return measured | log_gates(self.metrics, self.at.done, self.task.gates)

    def step(self) -> dict[str, float]:
        """One step; what to log of it."""
        at, task, began, used = self.at, self.task, time.monotonic(), time.process_time()
        with self.clock("data"):
            batch = next(self.stream)
        waited = time.monotonic() - began
        self.watchdog.beat(at.done, "step")
        task.begin(at.done)
        values = {"lr": set_learning_rate(task.optimizer, at.done, at.steps, self.settings)} | task.gradients(batch)
        if reason := self.guard.judge(values):
            task.discard()
            print(self.guard.report(at.done + 1, reason, lambda: self.stream.describe(at.done)), flush=True)
        else:
            with self.clock("optimizer"):
                task.update()
        at.done += 1
        values |= {"skipped": self.guard.skipped} | self.measures.record(at.done, self.tokens, self.clock)
        # A stop that meets a save waits for that one, and makes another.
        self.stop.expect(2 * (time.monotonic() - began + self.saver.last_seconds))
        # On a GPU the process's own time says nothing about what it computes.
        computed = time.process_time() - used if self.strategy.device.type == "cpu" else 0.0
        if slow := self.pace.step(waited, computed):
            print(f"step {at.done}: {slow}", flush=True)
        return values | {"pace/slowest": self.pace.slowest}

    def save(self) -> None:
        """A checkpoint of this step, unless there is one: to replace it would leave a moment without one."""
        if self.saved == self.at.done:
            return
        self.saved = self.at.done
        state = {
            "updates": self.at.done - self.guard.skipped,
            "stream": self.stream.state_dict(),
            "validations": self.at.validations,
            "gates": self.task.gates,
            "guard": self.guard.state_dict(),
            "identity": dict(self.folder.job.identity),
        }
        with self.clock("checkpoint"):
            self.saver.save(self.at.done, self.task.training_state(), state)
        if self.saver.last_seconds and self.strategy.world.rank == 0:  # for the next batch script
            write_json(self.folder.path / STOP_SECONDS, {"seconds": round(self.stop.margin, 1)})

    def resume(self) -> None:
        """Take everything from the newest checkpoint, if there is one.

        Raises:
            Mistake: the checkpoint is of other settings, or beyond the steps of this budget.
        """
        newest = checkpoint.newest(self.folder.checkpoints)
        if newest is None:
            return
        state, at, job = checkpoint.read_state(newest), self.at, self.folder.job
        _check_fits(newest, state["identity"], self.folder)
        at.done, at.validations, at.resumed = int(state["step"]), state["validations"], True
        if at.done > at.steps:
            raise Mistake(
                f"{job.name}: its checkpoint is at step {at.done}, beyond the {at.steps} steps of this token budget; "
                f"give the larger {job.stage}.tokens again, or use another --name"
            )
        if at.done < at.steps and "end" in at.validations:  # a larger budget: that was not the end
            at.validations[str(at.done)] = at.validations.pop("end")
        self.task.gates = state["gates"]
        self.task.load_training_state(lambda tensors: checkpoint.load(newest, tensors), int(state["updates"]))
        self.stream.load_state_dict(state["stream"])
        self.guard.load_state_dict(state["guard"])


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
