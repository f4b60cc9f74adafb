"""The training loop, of Stage I and Stage II alike. A step is the task's: `train/align.py`, `train/distill.py`."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Training
from xlstm_distill.data.stream import Batch, SampleStream
from xlstm_distill.parallel.strategy import Strategy
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag
from xlstm_distill.train import checkpoint
from xlstm_distill.train.gates import log_gates
from xlstm_distill.train.optim import set_learning_rate, set_optimizer_step, training_state


class Task(ABC):
    """A model with its objective."""

    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    """What trains, by name."""
    gates: Sequence[Sequence[float]] = ()
    """Mean output gate per layer and head of the last validation; empty for a student without a gate."""

    @abstractmethod
    def step(self, batch: Batch) -> dict[str, float]:
        """Gradients of this rank's share of a global batch, clipped, one optimiser step; what to log. Collective."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Numbers on the held-out samples; sets `gates`. Collective."""


def train(
    task: Task,
    stream: SampleStream,
    settings: Training,
    sequence: int,
    folder: JobFolder,
    strategy: Strategy,
    stop: StopFlag,
) -> dict[str, Any]:
    """Train until the token budget is consumed; resumes from the job's newest checkpoint.

    Args:
        task: what a step does.
        stream: this rank's share of each global batch; its position is part of the checkpoint.
        settings: budget, batch, schedule, cadence of validation and checkpoints.
        sequence: tokens per sample.
        folder: the job's folder.
        strategy: how the step is spread.
        stop: asked at every step, on all ranks together.

    Returns:
        Facts for the manifest: steps, tokens, tokens_per_s (of this process), validation at start and end.

    Raises:
        Stopped: a stop was requested; a checkpoint is durable.
    """
    tokens_per_step = settings.batch * sequence
    steps = max(1, settings.tokens // tokens_per_step)
    lead = strategy.world.rank == 0
    done, validations = _resume(task, stream, folder, steps)
    first, started, saved = done, time.monotonic(), done if validations else -1

    def save() -> None:
        nonlocal saved
        if saved == done:  # a stop right after a checkpoint: replacing it would leave a moment without one
            return
        saved = done
        state = {
            "stream": stream.state_dict(),
            "validations": validations,
            "gates": task.gates,
            "identity": dict(folder.job.identity),
        }
        tensors = training_state(task.parameters, task.optimizer)
        checkpoint.save(folder.checkpoints, done, tensors, state, settings.keep)

    with Metrics(folder.path, steps, resume_at=done if validations else -1, enabled=lead, tensorboard=True) as metrics:
        if not validations:
            validations["start"] = task.validate()
            metrics.log(0, validations["start"] | log_gates(metrics, 0, task.gates))
        while done < steps:
            if stop.requested():
                save()
                raise Stopped(f"{folder.job.name}: stopped at step {done} of {steps}; launch again to go on")
            began = time.monotonic()
            lr = set_learning_rate(task.optimizer, done, steps, settings)
            values = task.step(next(stream))
            done += 1
            last = done == steps
            if last or (settings.validate_every and done % settings.validate_every == 0):
                validations["end" if last else str(done)] = measured = task.validate()
                values |= measured | log_gates(metrics, done, task.gates)
            metrics.log(done, {**values, "lr": lr, "tokens_per_s": tokens_per_step / (time.monotonic() - began)})
            if last or done % settings.checkpoint_every == 0:
                save()
    if "end" not in validations:
        validations["end"] = task.validate()
    seconds = max(time.monotonic() - started, 1e-9)
    return {
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "tokens_per_s": round((done - first) * tokens_per_step / seconds, 1),
        "validation": {"start": validations["start"], "end": validations["end"]},
    }


def _resume(task: Task, stream: SampleStream, folder: JobFolder, steps: int) -> tuple[int, dict[str, dict[str, float]]]:
    """Steps made and validations so far, from the newest checkpoint into task and stream; (0, {}) without one.

    Raises:
        Mistake: the checkpoint is of other settings, or beyond the `steps` of this budget.
    """
    newest = checkpoint.latest(folder.checkpoints)
    if newest is None:
        return 0, {}
    state = checkpoint.read_state(newest)
    _check_fits(newest, state["identity"], folder)
    done, validations, task.gates = int(state["step"]), state["validations"], state.get("gates", ())
    if done > steps:
        raise Mistake(
            f"{folder.job.name}: its checkpoint is at step {done}, beyond the {steps} steps of this token budget; "
            f"give the larger {folder.job.stage}.tokens again, or use another --name"
        )
    if done < steps:
        validations.pop("end", None)  # a larger budget: that was not the end
    checkpoint.load(newest, training_state(task.parameters, task.optimizer))
    set_optimizer_step(task.optimizer, done)
    stream.load_state_dict(state["stream"])
    return done, validations


def _check_fits(newest: Path, saved: Mapping[str, Any], folder: JobFolder) -> None:
    from xlstm_distill.contract.job import plain

    for key, value in plain(folder.job.identity).items():
        if saved.get(key) != value:
            raise Mistake(f"{newest}: made with {key}={saved.get(key)}, this job has {value}; use another --name")


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """`batch` in parts of `size` samples."""
    for start in range(0, len(batch.tokens), size):
        yield batch.rows(slice(start, start + size))


def held_out_share(batch: Batch, size: int, world: World) -> Iterator[tuple[Batch, bool]]:
    """This rank's micro-batches of held-out samples, and whether they count.

    Every rank gets as many: a forward of sharded parameters is collective, and a rank that ran one fewer would leave
    the others waiting. Those that do not count repeat the first sample.
    """
    largest = -(-len(batch.tokens) // world.size)
    mine = list(micro_batches(batch.rows(slice(world.rank, None, world.size)), size))
    yield from ((part, True) for part in mine)
    for _ in range(-(-largest // size) - len(mine)):
        yield batch.rows(slice(0, 1)), False
