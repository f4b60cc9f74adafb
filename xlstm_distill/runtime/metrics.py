"""`metrics.jsonl` and TensorBoard of a job, written by rank 0."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from xlstm_distill.contract.files import read_lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 10
"""Until TensorBoard's events are on disk: as much of its curves does a kill cost. `metrics.jsonl` loses nothing."""


class Metrics:
    """One line of `metrics.jsonl` per call of `log`: `{"time", "step", "total", NAME: number, …}`.

    What is logged first at the step of the checkpoint joins the line of that step: a validation that a stop broke off.

    `step` of `total` is what the progress bars of `xdl launch` and `xdl status` show, in whatever unit the stage
    counts. Names with a slash (`loss/ce`) become groups in TensorBoard.

    Args:
        folder: the job folder.
        total: the last step.
        resume_at: after a resume, the step of the checkpoint: later lines of an earlier process are dropped, with −1
            all; None keeps them.
        enabled: False on ranks that do not write.
        tensorboard: whether to write TensorBoard events besides.
    """

    def __init__(
        self, folder: Path, total: int, *, resume_at: int | None = None, enabled: bool = True, tensorboard: bool = False
    ) -> None:
        self.total = total
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._told = False
        self._resumed: tuple[dict[str, float], int] | None = None
        """The last record of the earlier process, and where its line begins."""
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if resume_at is not None:
            self._resumed = keep_until(path, resume_at)
        before = path.read_bytes() if path.exists() else b""
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if before and not before.endswith(b"\n"):  # torn by a kill
            self._file.write("\n")
        if tensorboard:
            from torch.utils import tensorboard as boards

            self._board = boards.SummaryWriter(
                str(folder / "tensorboard"),
                purge_step=None if resume_at is None else resume_at + 1,
                flush_secs=FLUSH_SECONDS,
            )

    def log(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Record `values` at `step`."""
        if self._file is None:
            return
        record = {"time": round(time.time(), 3), "step": step, "total": self.total, **(values or {})}
        try:
            if self._resumed and self._resumed[0]["step"] == step:
                before, begins = self._resumed
                record = before | record
                self._file.truncate(begins)
            self._resumed = None
            self._write(json.dumps(record) + "\n", step, values or {})
        except OSError as error:  # a full disk is the checkpoint's to tell, on all ranks together
            if not self._told:
                print(f"step {step}: not recorded in metrics.jsonl and TensorBoard ({error.strerror})", flush=True)
            self._told = True

    def _write(self, line: str, step: int, values: Mapping[str, float]) -> None:
        assert self._file is not None
        self._file.write(line)
        if self._board and values:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # All numbers of a step as one event: 0.2 ms for 60 of them, where add_scalar for each takes 3.5.
            numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._board.file_writer.add_summary(Summary(value=numbers), step)  # type: ignore[attr-defined]

    def image(self, name: str, step: int, draw: "Callable[[], NDArray[np.uint8] | None]") -> None:
        """Record in TensorBoard the image [height, width, 3] that `draw` makes, if it makes one.

        `draw` is called only where TensorBoard events are written.
        """
        if self._board and (image := draw()) is not None:
            self._board.add_image(name, image, step, dataformats="HWC")

    def text(self, name: str, step: int, markdown: str) -> None:
        """Record a text in TensorBoard."""
        if self._board:
            self._board.add_text(name, markdown, step)

    def close(self) -> None:
        """Flush and close."""
        for opened in (self._file, self._board):
            with suppress(OSError):  # must not take the place of the error that ends the job
                if opened:
                    opened.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The records of a job's `metrics.jsonl`; a last line that a kill cut short is left out."""
    return read_lines(folder / "metrics.jsonl")


def keep_until(path: Path, step: int) -> tuple[dict[str, float], int] | None:
    """Drop the lines after `step`: they came from steps that a resumed run does again.

    Returns:
        The last record that is left and the offset of its line in bytes; None without one.
    """
    if not path.exists():
        return None
    kept = [r for r in read_metrics(path.parent) if r["step"] <= step]
    lines = [json.dumps(r) + "\n" for r in kept]  # ASCII
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(lines), encoding="utf-8")
    beside.replace(path)
    return (kept[-1], sum(map(len, lines[:-1]))) if kept else None
