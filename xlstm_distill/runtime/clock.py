"""Where the time of a step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

PARTS = ("data", "teacher", "forward", "backward", "optimizer", "checkpoint", "validation")
OTHER = "other"
"""What belongs to no part."""
WAITING = ("checkpoint", "validation")
"""What no step needs. Parts inside of these are not told apart: the forwards of a validation are validation."""


class Clock:
    """`with clock("data"): …` counts towards that part, and not towards one around it.

    At every change of part one mark is made: the time on a CPU, an event in the stream on a GPU. Nothing waits for the
    device until `take`, so kernels queue up as without a clock, and their time falls to the part that launched them. A
    collective belongs to the part that it happens in.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open = [OTHER]
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._mark(OTHER)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what happens in this block towards `part`.

        Raises:
            KeyError: it is none of `PARTS`.
        """
        if part not in PARTS:
            raise KeyError(part)
        self._open.append(self._open[-1] if self._open[-1] in WAITING else part)
        self._mark(self._open[-1])
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1])

    def take(self) -> dict[str, float]:
        """Seconds of each part, and of `OTHER`, since the last `take`, or the start. Waits for a GPU's last mark."""
        self._mark(self._open[-1])
        if self._cuda:
            self._marks[-1][1].synchronize()  # type: ignore[union-attr]
        seconds = dict.fromkeys((*PARTS, OTHER), 0.0)
        for (part, begin), (_, end) in pairwise(self._marks):
            seconds[part] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin  # type: ignore
        self._marks = self._marks[-1:]
        return seconds

    def _mark(self, part: str) -> None:
        """From here on time is `part`'s."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))
