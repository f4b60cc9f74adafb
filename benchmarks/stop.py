"""How long a training takes to stop when one of its ranks is asked to, and whether it always saves.

    python benchmarks/stop.py [--rounds 100] [--json out.json]

A Stage II job of two ranks with a random tiny teacher runs as a local launch runs it, through torch's elastic launch.
At a random moment of its steps, validations and saves a random one of its ranks gets USR2 or TERM. Measured: seconds
until the whole job has ended, launcher included; whether it ended with 75 and a checkpoint of which every file has its
hash, at the last step that was logged. Each round goes on from the one before.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from goodput import make_job, make_run

from xlstm_distill.contract.exitcode import STOPPED, Mistake
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.runtime.metrics import read_metrics
from xlstm_distill.train import checkpoint

RANKS, EVERY, MOST_SECONDS = 2, 10, 4.0
"""Steps between checkpoints and validations; seconds of training before a signal."""
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


def main() -> None:
    """Stop it again and again, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chance, results = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as place:
        folder = make_job(make_run(Path(place)), "stopped", steps=10**7, every=EVERY)
        distill = replace(folder.config.distill, validate_every=EVERY // 2, micro_batch=1)
        folder = replace(folder, config=replace(folder.config, distill=distill))
        folder.write()
        for number in range(options.rounds):
            results.append(stop_once(folder, chance, SIGNALS[number % 2]))
            print(f"{number + 1}: {results[-1]}", file=sys.stderr, flush=True)
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


def stop_once(folder: JobFolder, chance: random.Random, number: signal.Signals) -> dict[str, object]:
    """One start, one signal, one end."""
    process, rank = start(folder), chance.randrange(RANKS)
    heartbeats = [folder.path / f"heartbeats/rank-{rank}.json" for rank in range(RANKS)]
    until(process, lambda: all(path.exists() for path in heartbeats))  # the end of an earlier start removed them
    time.sleep(chance.uniform(0, MOST_SECONDS))
    pid = json.loads(heartbeats[rank].read_text(encoding="utf-8"))["pid"]
    asked = time.monotonic()
    os.kill(pid, number)
    code = process.wait(120)
    seconds = time.monotonic() - asked
    return {"signal": number.name, "rank": rank, "seconds": seconds, "code": code, "saved": saved(folder)}


def start(folder: JobFolder) -> "subprocess.Popen[bytes]":
    """The job as a local launch starts it; each rank writes its log."""
    command = [sys.executable, "-m", "xlstm_distill.runtime.elastic", str(RANKS), str(folder.path)]
    environment = {**os.environ, "XDL_LOGS": str(folder.logs)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def until(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    """Wait. Raises RuntimeError when the job ends instead."""
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the job ended with {process.returncode} before it was asked to")
        time.sleep(0.02)


def saved(folder: JobFolder) -> bool:
    """Whether the newest checkpoint is whole and at the last step that was logged."""
    newest = checkpoint.latest(folder.checkpoints)
    try:
        return newest is not None and checkpoint.read_state(newest)["step"] == read_metrics(folder.path)[-1]["step"]
    except Mistake:
        return False


def print_table(results: list[dict[str, object]]) -> None:
    """Seconds to the end, by signal and in all."""
    print("| signal | rounds | ended with 75 and a whole checkpoint | p50 | p99 | longest |\n" + "| --- " * 6 + "|")
    for name in (*(number.name for number in SIGNALS), "both"):
        rows = [row for row in results if name in (row["signal"], "both")]
        good = sum(row["code"] == STOPPED and bool(row["saved"]) for row in rows)
        seconds = sorted(float(str(row["seconds"])) for row in rows)
        if len(seconds) > 1:
            p99 = statistics.quantiles(seconds, n=100, method="inclusive")[98]
            middle, longest = statistics.median(seconds), seconds[-1]
            print(f"| {name} | {len(rows)} | {good} | {middle:.2f} s | {p99:.2f} s | {longest:.2f} s |")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
