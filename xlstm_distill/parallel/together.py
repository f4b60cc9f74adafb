"""What the ranks of a job tell each other in plain Python values, and how all end when one has failed."""

from typing import Any, Protocol

import torch.distributed as dist

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import World


class Stop(Protocol):
    """A stop flag that all ranks ask together (`runtime.stop`)."""

    def requested(self, also: bool = False) -> bool: ...


class Together:
    """Every method is collective; alone each is what it says of one. The process group has to be there."""

    def __init__(self, world: World) -> None:
        self.world = world

    def gather(self, mine: list[Any]) -> list[Any]:
        """What every rank has, in the order of the ranks; elsewhere than on rank 0 nothing."""
        if self.world.size == 1:
            return mine
        parts: list[Any] | None = [None] * self.world.size if self.world.rank == 0 else None
        dist.gather_object(mine, parts)
        return [item for part in parts for item in part] if parts else []

    def from_first(self, value: Any) -> Any:
        """The value of rank 0."""
        if self.world.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def go_on(self, stop: Stop, failed: Exception | None) -> None:
        """Return, or end on all ranks together: one that ended alone would leave the others in a collective.

        Args:
            stop: the request to stop.
            failed: what has gone wrong on this rank.

        Raises:
            Exception: `failed`; on the other ranks a Mistake of the same words.
            Stopped: a stop was requested.
        """
        if not stop.requested(failed is not None):
            return
        reasons = [str(failed or "")]
        if self.world.size > 1:
            reasons = reasons * self.world.size
            dist.all_gather_object(reasons, reasons[0])
        if failed:
            raise failed
        if told := next(filter(None, reasons), ""):
            raise Mistake(told)
        raise Stopped("stopped by request; launch again to go on")
