"""The writing end of a capture."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic
from xlstm_distill.contract.schema import Data
from xlstm_distill.data.shards import shard_writer
from xlstm_distill.teacher.index import write_note


class Sink:
    """Where rank 0 writes a unit, which is there when `stack` is closed; on other ranks nothing. What goes wrong is
    kept in `failed`, until the ranks agree to end."""

    def __init__(self, stack: ExitStack | None = None, folder: Path | None = None, data: Data | None = None) -> None:
        self.failed: Exception | None = None
        self.size = 0
        self._writer: Any = None
        if stack is not None and folder is not None and data is not None:
            self.failed = failure(lambda: self._open(stack, folder, data))

    def _open(self, stack: ExitStack, folder: Path, data: Data) -> None:
        self.folder = stack.enter_context(folder_atomic(folder))
        self._writer = stack.enter_context(shard_writer(self.folder, data.sequence, data.shard_bytes, targets=True))

    def write(self, sample: dict[str, Any], targets: bytes) -> None:
        """One sample with its targets."""
        self.size += len(targets)
        self._try(lambda: self._writer.write({**sample, "targets": targets}))

    def note(self, note: dict[str, Any]) -> None:
        """The unit's note."""
        self._try(lambda: write_note(self.folder, {**note, "target_bytes": self.size}))

    def _try(self, work: Callable[[], object]) -> None:
        if self._writer is not None and self.failed is None:
            self.failed = failure(work)


def failure(work: Callable[[], object]) -> Exception | None:
    """What stopped `work`: a mistake, or the file system."""
    try:
        work()
    except (Mistake, OSError) as error:
        return error
    return None
