"""What every training step logs besides its losses: speed, utilisation, the split of its time, memory, goodput."""

import platform
import time
from dataclasses import asdict
from typing import Any

import torch
import yaml

from xlstm_distill.contract import ledger
from xlstm_distill.contract.flops import StepFlops
from xlstm_distill.contract.job import JobFolder, World, code_version, plain
from xlstm_distill.runtime.clock import WAITING, Clock
from xlstm_distill.runtime.device import memory_gb, peak_flops
from xlstm_distill.runtime.metrics import Metrics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class StepMeasures:
    """Made when the training starts or goes on: it enters the start in the ledger and tells TensorBoard.

    Args:
        folder: of the job; its `metrics.jsonl` has been cut back to `step` (as `Metrics` does).
        world: this process among its ranks; only rank 0 measures.
        flops: per token, of `contract.flops.step_flops`.
        device: of this rank.
        metrics: for the texts.
        step: steps made so far.
    """

    def __init__(
        self, folder: JobFolder, world: World, flops: StepFlops, device: torch.device, metrics: Metrics, step: int
    ) -> None:
        self._folder, self._ranks, self._flops, self._device = folder.path, world.size, flops, device
        self._enabled = world.rank == 0
        if not self._enabled:
            return
        strategy = folder.config.strategy
        ledger.record_start(
            folder.path, step, ranks=world.size, strategy=strategy.name, host=platform.node(), **code_version()
        )
        starts = ledger.starts(folder.path)
        self._restarts, self._productive = len(starts) - 1, ledger.productive_seconds(folder.path)
        now = time.time()
        self._began = now - ledger.wall_seconds(folder.path, now)
        metrics.text("config", step, f"```yaml\n{yaml.safe_dump(plain(asdict(folder.config)), sort_keys=False)}```")
        metrics.text("starts", step, _table(starts))
        peak = peak_flops(device, DTYPES[strategy.precision])
        self._peak = peak.flops * world.size
        print(f"peak for MFU: {peak.flops / 1e12:.4g} TFLOP/s ({strategy.precision}, {peak.source})", flush=True)

    def record(self, step: int, tokens: int, clock: Clock) -> dict[str, float]:
        """The numbers of the step that ends here, by tag; takes the clock. On other ranks than 0 none.

        Args:
            step: its number, from 1.
            tokens: of its global batch.
            clock: what was counted since the step before.
        """
        parts = clock.take()
        if not self._enabled:
            return {}
        seconds = max(1e-9, sum(s for part, s in parts.items() if part not in WAITING))
        self._productive += seconds
        speed = tokens / seconds
        values = {
            "tokens": float(step * tokens),
            "tokens_per_s": speed,
            "tokens_per_s_per_device": speed / self._ranks,
            "mfu": speed * self._flops.total / self._peak,
            "seconds": seconds,
            **{f"time/{part}": s for part, s in parts.items()},
            **memory_gb(self._device),
            "restarts": float(self._restarts),
            "goodput": self._productive / max(1e-9, time.time() - self._began),
        }
        return {tag: float(f"{value:.6g}") if tag != "tokens" else value for tag, value in values.items()}

    def end(self, step: int) -> None:
        """The training is finished."""
        if self._enabled:
            ledger.record_end(self._folder, step)


def _table(starts: list[dict[str, Any]]) -> str:
    """The starts of a job as Markdown."""
    lines = ["| | time | step | ranks | strategy | host | code |", "| --- " * 7 + "|"]
    for number, start in enumerate(starts):
        when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(start["time"]))
        cells = [start.get(key, "") for key in ("step", "ranks", "strategy", "host")]
        code = start.get("commit", start.get("version", ""))[:12]
        lines.append(f"| {number} | {when} | {' | '.join(map(str, cells))} | {code} |")
    return "\n".join(lines)
