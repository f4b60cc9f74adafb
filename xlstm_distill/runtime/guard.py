"""Sick steps: losses or gradients that are not finite, and losses far above their recent past, are skipped.

The numbers that are judged are those of the global batch, the same on every rank, so all ranks come to the same verdict
without asking each other.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Guard as Settings

WINDOW = 128
"""Steps whose losses and gradient norms say what is usual; before so many were seen nothing counts as a spike."""
JUDGED = ("loss", "grad_norm")


class Guard:
    """Counts skipped steps; its state is part of the checkpoint."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.skipped = 0
        """Steps skipped since the first."""
        self.row = 0
        """Steps skipped one after another, up to now."""
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in JUDGED}

    def judge(self, values: Mapping[str, float]) -> str:
        """Why the step with these numbers is to be skipped; empty: it is not."""
        found = {name: values[name] for name in JUDGED if name in values}
        reason = next(filter(None, (self._sick(name, value) for name, value in found.items())), "")
        if reason:
            self.skipped, self.row = self.skipped + 1, self.row + 1
        else:
            self.row = 0
            for name, value in found.items():
                self.recent[name].append(value)
        return reason

    def _sick(self, name: str, value: float) -> str:
        if not math.isfinite(value):
            return f"{name} is {value}"
        seen = self.recent[name]
        if not self.settings.spike_sigma or len(seen) < WINDOW:
            return ""
        limit = statistics.fmean(seen) + self.settings.spike_sigma * statistics.pstdev(seen)
        if value <= limit:
            return ""
        return f"{name} is {value:.4g}, above {limit:.4g}: {self.settings.spike_sigma:g} sigma over {WINDOW} steps"

    def report(self, step: int, reason: str, samples: Callable[[], str]) -> str:
        """One line about the skipped `step`; `samples` names those of its global batch.

        Raises:
            Mistake: it was the last of `guard.skip_limit` in a row.
        """
        line = f"step {step} skipped: {reason}; samples {samples()}"
        if self.row < self.settings.skip_limit:
            return line
        raise Mistake(
            f"{self.row} steps in a row were skipped (guard.skip_limit), the last: {line}; look at these samples, or "
            f"train anew with a lower learning rate under another --name"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"skipped": self.skipped, "row": self.row, "recent": {n: list(v) for n, v in self.recent.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.skipped, self.row = int(state["skipped"]), int(state["row"])
        for name, values in state["recent"].items():
            self.recent[name] = deque(values, maxlen=WINDOW)
