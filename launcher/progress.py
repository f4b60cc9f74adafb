"""What a job's `metrics.jsonl` says about its progress, drawn as bars on a terminal and as plain lines elsewhere."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Protocol

TAIL = 1 << 14
"""Bytes of `metrics.jsonl` that are looked at from its end."""
TERMS = ("ce", "kl", "hidden")
"""Terms of the loss that are shown beside it."""
LINE_EVERY = 5.0
"""Seconds between plain lines."""


def last_record(folder: Path) -> dict[str, Any]:
    """The newest record of a job's `metrics.jsonl`, with what only earlier ones say (losses, speed), and `pace`, the
    median seconds of the recent steps; empty where there is none yet."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    found: dict[str, Any] = {}
    seconds: list[float] = []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut by a kill, or by the start of the tail
        if not isinstance(record, dict):
            continue
        if "step" not in found or loss_of(found) is None:
            found = {**record, **found}
        if "seconds" in record:
            seconds.append(record["seconds"])
    return {**found, "pace": median(seconds)} if seconds else found


def loss_of(record: Mapping[str, Any]) -> float | None:
    """The loss in a record: `loss`, else the first value whose name starts so."""
    names = [name for name in ("loss", "train/loss", "loss/total") if name in record]
    names += [name for name in record if name.startswith("loss")]
    return float(record[names[0]]) if names and isinstance(record[names[0]], int | float) else None


def speed_of(record: Mapping[str, Any]) -> float | None:
    """Tokens per second in a record."""
    return next(
        (float(v) for k, v in record.items() if k.endswith("tokens_per_s") and isinstance(v, int | float)), None
    )


def seconds_left(record: Mapping[str, Any]) -> float | None:
    """Until the last step, at the pace of the recent ones; None where a stage says nothing of its seconds."""
    if "pace" not in record or "total" not in record:
        return None
    return float(record["pace"] * max(0, record["total"] - record.get("step", 0)))


def describe(record: Mapping[str, Any]) -> str:
    """`12/40  loss 0.312 (ce 2.11, kl 0.112)  49.2k tokens  812 tok/s  3 min left`."""
    words = [f"{record.get('step', 0)}/{record.get('total', '?')}"]
    if (loss := loss_of(record)) is not None:
        terms = [f"{name} {record[f'loss/{name}']:.3g}" for name in TERMS if f"loss/{name}" in record]
        words.append(f"loss {loss:.4g}" + (f" ({', '.join(terms)})" if terms else ""))
    if isinstance(tokens := record.get("tokens"), int | float):
        words.append(f"{short(tokens)} tokens")
    if (speed := speed_of(record)) is not None:
        words.append(f"{speed:,.0f} tok/s")
    if left := seconds_left(record):
        words.append(f"{duration(left)} left")
    return "  ".join(words)


def short(count: float) -> str:
    """`812`, `49.2k`, `1.31B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `25 h`, `4 d`: in the largest unit of which there are two."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


class Display(Protocol):
    """Shows how the jobs get on."""

    def begin(self, job: str) -> None: ...
    def update(self, record: Mapping[str, Any]) -> None: ...
    def end(self, verdict: str) -> None: ...
    def say(self, text: str) -> None: ...
    def __enter__(self) -> "Display": ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None: ...


class Lines:
    """Plain lines, one every few seconds."""

    def __init__(self) -> None:
        self.job, self.began, self.said, self.shown = "", 0.0, 0.0, ""

    def begin(self, job: str) -> None:
        self.job, self.began, self.said, self.shown = job, time.monotonic(), time.monotonic(), ""
        self.say(f"{job}: started")

    def update(self, record: Mapping[str, Any]) -> None:
        if record and time.monotonic() - self.said >= LINE_EVERY and (text := describe(record)) != self.shown:
            self.said, self.shown = time.monotonic(), text
            self.say(f"{self.job}: {text}")

    def end(self, verdict: str) -> None:
        self.say(f"{self.job}: {verdict} after {time.monotonic() - self.began:.0f} s")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        return None


class Bars:
    """One Rich progress bar per job."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, TimeElapsedColumn())
        self.task: Any = None

    def begin(self, job: str) -> None:
        self.task = self.progress.add_task(job, total=None, note="starting")

    def update(self, record: Mapping[str, Any]) -> None:
        if record:
            note = describe(record).partition("  ")[2]
            self.progress.update(self.task, completed=record.get("step", 0), total=record.get("total"), note=note)

    def end(self, verdict: str) -> None:
        total = self.progress.tasks[self.task].total or 1
        if verdict == "done":
            self.progress.update(self.task, completed=total, total=total)
        self.progress.update(self.task, note=verdict)
        self.progress.stop_task(self.task)

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.progress.stop()


def display() -> Display:
    """Bars on a terminal, lines elsewhere."""
    return Bars() if sys.stdout.isatty() else Lines()
