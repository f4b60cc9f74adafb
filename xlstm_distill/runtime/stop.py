"""The request to stop: USR2 or TERM to any rank, a `stop` file in the job folder, or the end of the time limit.

A rank that stopped alone would leave the others in a collective for ever, so the flag is all-reduced: every loop asks
`requested()` at the same points on every rank, and all of them get the same answer.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from xlstm_distill.contract.exitcode import Mistake, Stopped

if TYPE_CHECKING:
    import torch

DEADLINE = "XDL_DEADLINE"
"""Environment variable: end of the time limit in unix seconds; 0 or absent: none."""
LEAVING_SECONDS = 30.0
"""Between a durable checkpoint and the end of the time limit: ranks leave, the batch script decides what follows."""
UNKNOWN_SECONDS = 30.0
"""Stands for a step and a save until the loop has told how long they take."""
LOOK_SECONDS = 1.0
"""Between two looks at the stop file: it may lie on a network file system, and steps may be short."""


class StopFlag:
    """Installed once per process, before anything slow.

    Raises:
        Mistake: XDL_DEADLINE is no number.
    """

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self.signalled = False
        self.margin = LEAVING_SECONDS + UNKNOWN_SECONDS
        self._deadline = _deadline()
        self._looked, self._stands = float("-inf"), False
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def expect(self, seconds: float) -> None:
        """From now on a stop needs so many seconds until its checkpoint is durable: the step before the next question,
        a save that is under way, and its own."""
        self.margin = LEAVING_SECONDS + seconds

    def requested(self, also: bool = False) -> bool:
        """Whether any rank was asked to stop, or `also`. Collective: all ranks call it, at the same points."""
        mine = also or self.signalled or self._near_deadline() or self._file_stands()
        dist = sys.modules.get("torch.distributed")  # who has not imported it is alone
        if dist is None or not (dist.is_available() and dist.is_initialized()):
            return mine
        import torch

        flag = torch.tensor([float(mine)], device=number_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def check(self) -> None:
        """Raise `Stopped` when a stop was requested: for loops whose finished pieces are already durable."""
        if self.requested():
            raise Stopped("stopped by request; launch again to go on")

    def _near_deadline(self) -> bool:
        return self._deadline > 0 and time.time() + self.margin > self._deadline

    def _file_stands(self) -> bool:
        """As of the last look, at most `LOOK_SECONDS` ago."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked, self._stands = now, self.stop_file.exists()
        return self._stands


def _deadline() -> float:
    given = os.environ.get(DEADLINE) or "0"
    try:
        return float(given)
    except ValueError as error:
        raise Mistake(f"{DEADLINE}={given}: expected unix seconds; unset it where there is no time limit") from error


def number_device() -> "torch.device":
    """Where a few numbers have to lie for a collective of the default process group: on the CPU where that has a
    backend, so that nothing waits for a GPU; with NCCL alone on this rank's GPU."""
    import torch
    import torch.distributed as dist

    return torch.device("cpu" if "cpu:" in dist.get_backend_config() else "cuda")
