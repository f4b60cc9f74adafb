"""The ranks of an evaluation: each holds a copy of the model, rank 0 leads, the others do what it hands out.

Rank 0 runs lm-eval and everything else in which there is no model; what needs one goes through `share`, in rounds:
every rank gets some of the items, all wait for the answers. Between rounds all ranks ask the stop flag together. Alone
it is the same, without a process group.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import World
from xlstm_distill.parallel.together import Together

PATIENCE = 7 * 86400.0
"""Seconds for which a rank waits for the next round: rank 0 may be running generated programs. A rank that dies ends
the job by its launcher."""
Handler = Callable[[list[Any]], list[Any]]
"""Items → an answer to each."""


class Stop(Protocol):
    """What a team needs of `runtime.stop.StopFlag`."""

    def requested(self, also: bool = False) -> bool: ...

    def expect(self, seconds: float) -> None: ...


class _Round(NamedTuple):
    """What rank 0 tells the others."""

    kind: str
    parts: list[list[Any]]
    """Items of each rank."""


class _Failed(NamedTuple):
    """The answer of a rank on which something went wrong."""

    words: str
    mistake: bool


class RankFailed(Exception):
    """Something went wrong in a round; the ranks are still together. The message is the last line of the error."""


class Team:
    """All methods but `serve` are for rank 0.

    Args:
        world: this process among the ranks.
        stop: asked by all ranks before every round.
    """

    def __init__(self, world: World, stop: Stop) -> None:
        self.world, self.stop, self.ranks = world, stop, Together(world)
        self.handlers: dict[str, Handler] = {}
        """By kind; the same on every rank."""
        self.on_items: Callable[[int, int], None] = lambda done, total: None
        """Hears how many of the items of a `share` have their answer."""
        self._over = False
        self._longest = 0.0
        """Seconds of the longest round: so long may a stop take to be heard."""

    def __enter__(self) -> "Team":
        import torch

        if torch.cuda.is_available():  # a site may show each rank its own GPU only
            torch.cuda.set_device(self.world.local_rank % torch.cuda.device_count())
        if self.world.size > 1:
            from xlstm_distill.parallel.group import join

            join(self.world, PATIENCE)
        return self

    def __exit__(self, *error: object) -> None:
        if self.world.size == 1:
            return
        import torch.distributed as dist

        if self.world.rank == 0 and not self._over:
            self.ranks.from_first(None)
        dist.destroy_process_group()

    def serve(self) -> None:
        """On the other ranks: take part in rounds until rank 0 has no more.

        Raises:
            Stopped: a stop was requested.
        """
        while (told := self.ranks.from_first(None)) is not None:
            self._take_part(told)

    def everywhere(self, kind: str, item: Any) -> None:
        """Let every rank handle the same item."""
        self._lead(_Round(kind, [[item] for _ in range(self.world.size)]))

    def share(self, kind: str, items: Sequence[Any], size: Callable[[int], int]) -> list[Any]:
        """The answers to `items`, in their order.

        Args:
            kind: of the handler.
            items: best sorted so that neighbours take as long as each other.
            size: how many items a rank takes in the round that begins with that item; of those of a round rank r gets
                every `world.size`-th from the r-th on.

        Raises:
            RankFailed: a rank could not answer.
            Mistake: it says that the user has to mend something.
            Stopped: a stop was requested.
        """
        answers: list[Any] = []
        ranks = self.world.size
        while len(answers) < len(items):
            first = len(answers)
            now = items[first : first + size(first) * ranks]
            parts = self._lead(_Round(kind, [list(now[rank::ranks]) for rank in range(ranks)]))
            answers += [parts[index % ranks][index // ranks] for index in range(len(now))]
            self.on_items(len(answers), len(items))
        return answers

    def _lead(self, told: _Round) -> list[list[Any]]:
        self.ranks.from_first(told)
        return self._take_part(told)

    def _take_part(self, told: _Round) -> list[list[Any]]:
        """One round, the same on all ranks; the answers are on rank 0 only."""
        if self.stop.requested():
            self._over = True
            raise Stopped("stopped by request; launch again to go on")
        began = time.monotonic()
        try:
            mine = told.parts[self.world.rank]
            answer: list[Any] | _Failed = self.handlers[told.kind](mine) if mine else []
        except Exception as error:
            traceback.print_exc()
            answer = _Failed(last_line(error), isinstance(error, Mistake))
        answers = self.ranks.gather([answer])
        self._longest = max(self._longest, time.monotonic() - began)
        self.stop.expect(self._longest)
        for failed in (answer for answer in answers if isinstance(answer, _Failed)):
            raise Mistake(failed.words) if failed.mistake else RankFailed(failed.words)
        return answers


def last_line(error: BaseException) -> str:
    """What went wrong, in one line: what a traceback ends with, as it would be printed."""
    if isinstance(error, Mistake | RankFailed):
        return " ".join(str(error).split())
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
