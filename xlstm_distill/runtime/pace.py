"""Which rank is slower than the others, whose time it costs: all of them wait for it at every step."""

import platform
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from xlstm_distill.contract.job import World
from xlstm_distill.runtime.stop import number_device

CAUSES = ("data", "compute")
RATIO = 1.5
"""Slow is above so many times the median of the others …"""
MOST_SECONDS_ALIKE = 0.05
"""… and so many seconds per step beyond it."""
QUIET_STEPS = 100
"""A rank is named for a cause once in so many steps."""


class Slow(NamedTuple):
    """A rank that is slower than the others."""

    rank: int
    cause: str
    seconds: float
    """Per step."""
    ratio: float
    """To the median of the other ranks, or to a millisecond."""


def slow_ranks(seconds: Sequence[Sequence[float]]) -> list[Slow]:
    """The ranks that are slow for a cause, the worst first.

    Args:
        seconds: per rank its seconds per step by `CAUSES`.
    """
    found = []
    for column, cause in enumerate(CAUSES):
        values = [row[column] for row in seconds]
        for rank, value in enumerate(values):
            others = values[:rank] + values[rank + 1 :]
            usual = statistics.median(others) if others else value
            if value > RATIO * usual and value >= usual + MOST_SECONDS_ALIKE:
                found.append(Slow(rank, cause, value, value / max(usual, 1e-3)))
    return sorted(found, key=lambda slow: slow.seconds, reverse=True)


class Pace:
    """Compares the ranks every `every` steps with one all-gather of two numbers per rank.

    What can be known: the wait for data is exact everywhere. The time in which a rank computes must not hold its waits
    for others, or all ranks look alike. On a CPU that is the process's own CPU time (`time.process_time`): collectives
    wait without using it. On a GPU the waits lie in its queue beside the kernels: events around a part without
    collectives tell, else give 0, and only data is compared.
    """

    slowest = 1.0
    """At the last comparison: seconds per step of the slowest rank ÷ median of all, for `pace/slowest`."""

    def __init__(self, world: World, every: int = 20) -> None:
        self._world, self._every = world, every
        self._steps = 0
        self._sums = [0.0] * len(CAUSES)
        self._hosts: list[str] = []
        self._named: dict[tuple[int, str], int] = {}

    def step(self, data_seconds: float, compute_seconds: float) -> str | None:
        """Count a step of this rank. Collective at every `every`-th; a line about slow ranks if there are any, the same
        on all ranks.

        Args:
            data_seconds: in which this rank waited for its samples.
            compute_seconds: in which it computed, without waiting for others.
        """
        self._steps += 1
        self._sums = [a + b for a, b in zip(self._sums, (data_seconds, compute_seconds), strict=True)]
        if self._world.size == 1 or self._steps % self._every:
            return None
        mine, self._sums = [total / self._every for total in self._sums], [0.0] * len(CAUSES)
        rows = self._gather(mine)
        sums = [sum(row) for row in rows]
        self.slowest = max(sums) / max(statistics.median(sums), 1e-9)
        return "; ".join(self._line(slow) for slow in slow_ranks(rows) if self._is_news(slow)) or None

    def _gather(self, mine: list[float]) -> list[list[float]]:
        import torch
        import torch.distributed as dist

        size = self._world.size
        if not self._hosts:
            found: list[str | None] = [None] * size
            dist.all_gather_object(found, platform.node())
            self._hosts = [str(host) for host in found]
        rows = [torch.zeros(len(mine), dtype=torch.float64, device=number_device()) for _ in range(size)]
        dist.all_gather(rows, torch.tensor(mine, dtype=torch.float64, device=number_device()))
        return [row.tolist() for row in rows]

    def _is_news(self, slow: Slow) -> bool:
        key = (slow.rank, slow.cause)
        if self._steps - self._named.get(key, -QUIET_STEPS) < QUIET_STEPS:
            return False
        self._named[key] = self._steps
        return True

    def _line(self, slow: Slow) -> str:
        times = f"{slow.ratio:.1f}× the median of the others ({slow.seconds:.2f} s per step)"
        return f"rank {slow.rank} (host {self._hosts[slow.rank]}) is slow: {slow.cause} {times}"
