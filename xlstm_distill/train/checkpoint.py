"""Checkpoints: written beside, flushed, hashed, renamed; `latest` moves only when the new one is durable.

    checkpoints/latest           name of the newest whole checkpoint
    checkpoints/step-N/          DCP files of row-sharded tensors, state.json, hashes.json (xxh64 of each file)

DCP's `.metadata` is a pickle: no file is read before its hash was compared.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_file, sync, write_atomic, write_json

HASHES = "hashes.json"


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> None:
    """Save a checkpoint of `step`. Collective.

    Args:
        folder: the job's `checkpoints/`.
        step: steps made.
        tensors: plain tensors or DTensors by name.
        state: JSON values (data position, identity, …).
        keep: number of newest checkpoints that stay.

    Raises:
        Mistake: the disk is full or the folder cannot be written; the earlier checkpoints are intact.
    """
    beside, final = folder / f".step-{step}.tmp", folder / f"step-{step}"
    lead = _rank() == 0
    try:
        if lead:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        _barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP says at every save that no process group is used
            dcp.save(dict(tensors), checkpoint_id=str(beside), no_dist=not _distributed())
        if lead:
            write_json(beside / "state.json", {"step": step, **state})
            _make_durable(beside, final)
            write_atomic(folder / "latest", final.name)
            _prune(folder, keep)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise Mistake(
            f"{final}: the checkpoint could not be written ({_cause(error)}); the earlier ones are intact"
        ) from error
    _barrier()


def _cause(error: BaseException) -> str:
    """The first line of what went wrong on the first failing rank: DCP wraps every rank's failure."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).splitlines()), type(error).__name__)


def _make_durable(beside: Path, final: Path) -> None:
    files = sorted(p for p in beside.rglob("*") if p.is_file())
    write_json(beside / HASHES, {p.relative_to(beside).as_posix(): hash_file(p) for p in files})
    for file in files:
        sync(file)
    sync(beside)
    if final.exists():
        shutil.rmtree(final)
    beside.replace(final)
    sync(final.parent)


def _prune(folder: Path, keep: int) -> None:
    numbered = sorted((int(p.name.removeprefix("step-")), p) for p in folder.glob("step-*"))
    for _, old in numbered[: -max(1, keep)]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    try:
        return folder / (folder / "latest").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, after every file of it was compared with its hash.

    Raises:
        Mistake: a file is missing or was changed.
    """
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(
            f"{checkpoint}: not a whole checkpoint ({error}); remove it to go on from an older one"
        ) from error
    for name, expected in hashes.items():
        file = checkpoint / name
        if not file.is_file() or hash_file(file) != expected:
            raise Mistake(f"{file}: missing or damaged; put an older step-N into {checkpoint.parent}/latest")
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Read into `tensors`, whatever the number of ranks that saved. Call `read_state` first. Collective."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=str(checkpoint), no_dist=not _distributed())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _barrier() -> None:
    if _distributed():
        dist.barrier()
