"""Copies of the training state in host memory, and how DCP writes them while the originals go on changing."""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

# Not catch_warnings around each call: it is not safe beside other threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Copies:
    """This rank's parts of the tensors, in memory that is kept: fresh memory costs page faults, or pinning."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy `tensors`, plain ones or DTensors; they may change when this returns."""
        parts = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        self._tensors = tensors
        self._copies = {name: _room(part, self._copies.get(name)) for name, part in parts.items()}
        for name, part in parts.items():
            self._copies[name].copy_(part, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self, folder: Path, group: dist.ProcessGroup | None) -> None:
        """Write what was copied to `folder` and flush it. Collective in `group`; None: one process.

        Raises:
            CheckpointException: on every rank, when one could not write.
        """
        writer, planner = _Writer(folder), _Planner(self._copies)
        dcp.save(self._tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
        self._tensors = {}  # some are made for the checkpoint only


class _Planner(DefaultSavePlanner):
    """Plans by the shapes and placements of the tensors that train, and writes their copies."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


class _Writer(dcp.FileSystemWriter):
    """DCP's, flushing its files; what the operating system said of a failure comes through torch.save."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)  # the copies are on the host: no CUDA stream is needed

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # three quarters of the time; the files get a hash
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _origin(error) from error
        finally:
            torch.serialization.set_crc32_options(checksums)


def _origin(error: BaseException) -> BaseException:
    """The OSError that led to `error`, if there is one: torch.save then says only that a size differs."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return found
        found = found.__cause__ or found.__context__
    return error


def _room(part: Tensor, before: Tensor | None) -> Tensor:
    """Memory of the host for a copy of `part`: that of its copy `before`, if it fits."""
    if before is not None and (before.shape, before.dtype) == (part.shape, part.dtype):
        return before
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
