"""Checkpoints: copied in memory, then written in the background beside, flushed, hashed, renamed; verified when read.

    checkpoints/latest           name of the newest checkpoint; moves only when that one is durable
    checkpoints/step-N/          DCP files of row-sharded tensors, state.json, hashes.json (xxh64 of each file)
    checkpoints/.step-N*.tmp/    being written or removed; what a killed process left goes at the next save

A folder gets and loses the name step-N by a rename, so it is whole or absent. DCP's `.metadata` is a pickle: no file is
read before its hash was compared.
"""

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_file, sync, write_atomic, write_json
from xlstm_distill.train.staging import Copies

T = TypeVar("T")
LATEST, HASHES, STATE = "latest", "hashes.json", "state.json"
UNKNOWN_SECONDS = 30.0
"""Stands for a save until one was timed."""
LONGEST_SECONDS = 3600.0
"""A save that is waited for longer counts as stuck."""


class Checkpoints:
    """Writes the checkpoints of one training, one at a time, while its steps go on.

    The writing thread speaks to other ranks through a process group of its own, so that its collectives cannot meet
    those of the steps. Whatever fails on one rank is known to all of them.
    """

    last_seconds = UNKNOWN_SECONDS
    """From the end of the last save's copying until it was durable."""

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        """Collective.

        Args:
            folder: the job's `checkpoints/`.
            keep: number of newest checkpoints that stay.
            keep_every: besides them stays each whose step is a multiple of it; 0: none.
        """
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._group = dist.new_group(backend="gloo") if _distributed() else None
        self._copies = Copies()
        self.waiting: Callable[[], None] = lambda: None
        """Called before a save is waited for."""
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copy `tensors` and write them in the background; the step that `latest` names already stays as it is.

        Waits for an earlier save first. Collective.

        Args:
            step: steps made.
            tensors: plain tensors (the same on all ranks; written once) or DTensors by name. They may change as soon as
                this returns.
            state: JSON values (data position, identity, …).

        Raises:
            Mistake: the earlier save failed.
        """
        self.wait()
        text = json.dumps({"step": step, **state}, indent=2, ensure_ascii=False) + "\n"
        self._copies.take(tensors)
        self._writer = threading.Thread(target=self._run, args=(step, text), name=f"checkpoint of step {step}")
        self._writer.start()

    @property
    def failed(self) -> bool:
        """Whether a save has failed in the background, as far as this rank knows by now; `wait` says how."""
        return self._error is not None

    def wait(self) -> None:
        """Return when the last save is durable. Collective.

        Raises:
            Mistake: it could not be written (disk full, folder read-only, …); the same on every rank.
        """
        if self._writer is not None:
            if self._writer.is_alive():
                self.waiting()
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, step: int, state: str) -> None:
        """The background thread."""
        began = time.monotonic()
        try:
            _step_aside()
            self._write(step, state)
        except (_Unwritten, CheckpointException) as error:
            line = f"the checkpoint could not be written ({_cause(error)}); the earlier ones are intact"
            self._error = Mistake(f"{self.folder / f'step-{step}'}: {line}")
        except BaseException as error:  # other ranks are gone: the process ends with this, and is started again
            self._error = error
        self.last_seconds = time.monotonic() - began

    def _write(self, step: int, state: str) -> None:
        beside, final = self.folder / f".step-{step}.tmp", self.folder / f"step-{step}"
        if not self._on_lead(lambda: self._begin(beside, final)):
            return
        try:
            self._copies.write(beside, self._group)
            hashes = self._together(lambda: {p.name: hash_file(p) for p in sorted(beside.glob(f"__{_rank()}_*"))})
            known = {name: value for part in hashes for name, value in part.items()}
            self._on_lead(lambda: self._publish(beside, final, state, known))
        except BaseException:
            if _rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)
            raise

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gave on every rank. When it failed on one, that is raised on all: none waits for ever."""
        mine: T | _Unwritten
        try:
            mine = work()
        except Exception as error:
            mine = _Unwritten(_cause(error))
        results = [mine]
        if self._group:
            results = results * dist.get_world_size(self._group)
            dist.all_gather_object(results, mine, group=self._group)
        if failures := [result for result in results if isinstance(result, _Unwritten)]:
            raise failures[0]
        return results  # type: ignore[return-value]

    def _on_lead(self, work: Callable[[], T]) -> T | None:
        """What `work` gave on rank 0, on every rank."""
        return self._together(lambda: work() if _rank() == 0 else None)[0]

    def _begin(self, beside: Path, final: Path) -> bool:
        """Make the folder to write to; False if the checkpoint is there already."""
        if latest(self.folder) == final and final.is_dir():
            return False
        for left in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(left)
        beside.mkdir(parents=True)
        return True

    def _publish(self, beside: Path, final: Path, state: str, hashes: dict[str, str]) -> None:
        """The last steps, in the order that makes a kill between any two of them harmless. DCP flushed its files."""
        write_atomic(beside / STATE, state)
        rest = sorted(p for p in beside.iterdir() if p.name not in hashes)
        write_json(beside / HASHES, hashes | {p.name: hash_file(p) for p in rest})
        if final.exists():  # `latest` names an older one: the training had gone back
            _remove(final)
        beside.replace(final)
        sync(self.folder)
        write_atomic(self.folder / LATEST, final.name)
        _prune(self.folder, int(final.name.removeprefix("step-")), self.keep, self.keep_every)


class _Unwritten(Exception):
    """Why a checkpoint could not be written."""


def _step_aside() -> None:
    """Leave the processors to the step: the lowest priority for this thread (on Linux threads have their own)."""
    if sys.platform == "linux":
        with suppress(OSError):  # not allowed in some sandboxes
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # real-time classes know no nice
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _cause(error: BaseException) -> str:
    """What went wrong on the first failing rank, in one line: DCP wraps every rank's failure."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)


def _prune(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Remove what need not stay of the checkpoints up to `step`, the newest; later ones are a future gone back on."""
    earlier = sorted(number for number in _steps(folder) if number <= step)
    for number in earlier[: -max(1, keep)]:
        if not (keep_every and number % keep_every == 0):
            with suppress(OSError):  # tried again at the next save
                _remove(folder / f"step-{number}")


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints by step."""
    found = {p: re.fullmatch(r"step-(\d+)", p.name) for p in folder.glob("step-*")}
    return {int(match[1]): path for path, match in found.items() if match}


def _remove(checkpoint: Path) -> None:
    """Rename first: half a folder must not bear a checkpoint's name."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    try:
        return folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def newest(folder: Path) -> Path | None:
    """`latest` as rank 0 sees it, on every rank: on a network file system another node may still see an older one.
    Collective."""
    found = [latest(folder) if _rank() == 0 else None]
    if _distributed():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, after every file of it was compared with its hash. Collective.

    Raises:
        Mistake: a file is missing or was changed; the same on every rank.
    """
    if not (damage := _damage(checkpoint)):
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    others = (path for _, path in sorted(_steps(checkpoint.parent).items(), reverse=True) if path != checkpoint)
    if whole := next((path for path in others if not _damage(path)), None):
        raise Mistake(
            f"{damage}; {whole.name} is whole: write its name into {checkpoint.parent / LATEST} to go on from it"
        )
    raise Mistake(f"{damage}, and no other checkpoint is whole; remove {checkpoint.parent} to begin again")


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, the same on every rank; empty: nothing. Each rank reads a share of the files."""
    mine = _damage_of_share(checkpoint)
    if not _distributed():
        return mine
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next(filter(None, found), "")


def _damage_of_share(checkpoint: Path) -> str:
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{checkpoint}: not a whole checkpoint ({error})"
    ranks = dist.get_world_size() if _distributed() else 1
    for name in sorted(hashes)[_rank() :: ranks]:
        file = checkpoint / name
        if not file.is_file() or hash_file(file) != hashes[name]:
            return f"{file}: missing or damaged"
    return ""


def load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Read into `tensors`, whatever the number of ranks that saved. Call `read_state` first. Collective.

    Raises:
        Mistake: a tensor is not in it, or has another shape.
    """
    try:
        dcp.load(tensors, checkpoint_id=str(checkpoint), no_dist=not _distributed())
    except CheckpointException as error:
        line = f"{checkpoint}: does not fit this student ({_cause(error)}); use another --name"
        raise Mistake(line) from error


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0
