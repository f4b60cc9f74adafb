"""The request to stop: USR2 or TERM to any rank, or a `stop` file in the job folder.

A rank that stopped alone would leave the others in a collective for ever, so the flag is all-reduced: every loop asks
`requested()` at the same points on every rank, and all of them get the same answer.
"""

import signal
from pathlib import Path
from types import FrameType

from xlstm_distill.contract.exitcode import Stopped


class StopFlag:
    """Installed once per process, before anything slow."""

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self.signalled = False
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def requested(self, also: bool = False) -> bool:
        """Whether any rank was asked to stop, or `also`. Collective: all ranks call it, at the same points."""
        mine = also or self.signalled or self.stop_file.exists()
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return mine
        flag = torch.tensor([float(mine)])
        if dist.get_backend() == "nccl":
            flag = flag.cuda()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def check(self) -> None:
        """Raise `Stopped` when a stop was requested: for loops whose finished pieces are already durable."""
        if self.requested():
            raise Stopped("stopped by request; launch again to go on")
