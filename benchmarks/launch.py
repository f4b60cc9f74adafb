"""The launcher's own time, on a Slurm cluster of real daemons on this machine, with stages that only sleep.

    python benchmarks/launch.py [--signals 50] [--json out.json]

    submission   `launch` of a pipeline of four experts whose data are fetched, after imports: ten calls of sbatch
    hand-over    from the end of the last expert to the start of merge
    status       `xdl status --json` of a run of 64 jobs in the queue, as a command, and its calls of Slurm's programs
    signals      USR2 to jobs that train, long before their limit, as a preemption sends it: how many went on from their
                 checkpoint

Needs Slurm (`make slurm`) and nothing of torch.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests/slurm"), str(ROOT / "tests/unit"), str(ROOT)]

from cluster import SlurmCluster, missing  # noqa: E402
from slurm_support import EXPERTS, User, write_configs  # noqa: E402

TIMED = """
import sys, time
import jinja2, yaml, hydra._internal.config_loader_impl, omegaconf, rich.progress
import launcher.cli, launcher.launch, launcher.compose, launcher.checks, launcher.snapshot
from launcher.backends import local, slurm
import io, contextlib
with contextlib.redirect_stdout(io.StringIO()):
    launcher.cli.main(["launch", "--help"])  # typer imports the rest of itself when a command is parsed
began = time.perf_counter()
code = launcher.cli.main(sys.argv[1:])
print("seconds", time.perf_counter() - began)
sys.exit(code)
"""
COUNTING = '#!/bin/sh\necho "$(basename "$0")" >>"$CALLS"\nexec "$REAL/$(basename "$0")" "$@"\n'
PROGRAMS = ("sbatch", "squeue", "scontrol", "sacct", "scancel", "sinfo")


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="submissions and looks that are timed")
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if absent := missing():
        sys.exit(f"Slurm is not installed here (no {', '.join(absent)}); `make slurm` installs it")
    with tempfile.TemporaryDirectory() as place:
        cluster = SlurmCluster(Path(place) / "slurm")
        cluster.folder.mkdir()
        try:
            cluster.start()
            found = {
                "submission_s": submission(cluster, Path(place), options.rounds),
                "hand_over_s": hand_over(cluster, Path(place), options.rounds),
                **status(cluster, Path(place), options.rounds),
                **signals(cluster, Path(place), options.signals),
            }
        finally:
            cluster.stop()
    for name, value in found.items():
        print(f"{name:<20} {value}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


def user_of(cluster: SlurmCluster, place: Path, name: str, experts: tuple[str, ...] = EXPERTS) -> User:
    """Somebody with a folder and settings of their own."""
    folder = place / name
    folder.mkdir()
    return User(cluster, folder, write_configs(folder, experts))


def submission(cluster: SlurmCluster, place: Path, rounds: int) -> dict[str, float]:
    """Median seconds, and how many calls of sbatch are in them."""
    taken = []
    for number in range(rounds):
        user = user_of(cluster, place, f"submission-{number}")
        user.launch("stage=fetch")
        command = [sys.executable, "-c", TIMED, "launch", "--name", "r", "cluster=slurm", "teacher=tiny"]
        said = subprocess.run(command, cwd=user.folder, env=user.env(), capture_output=True, text=True, check=True)
        taken.append(float(said.stdout.rpartition("seconds ")[2]))
        cancel(cluster, user)
    return {"median": round(statistics.median(taken), 3), "worst": round(max(taken), 3), "sbatch": len(user.ids())}


def hand_over(cluster: SlurmCluster, place: Path, rounds: int) -> dict[str, float]:
    """Seconds by Slurm's records, which count whole ones."""
    waits = []
    for number in range(rounds):
        user = user_of(cluster, place, f"hand-over-{number}")
        user.launch("stage=merge")
        user.until_ended("merge", seconds=120)
        last = max(user.records(f"distill-{name}")[0].end for name in EXPERTS)
        waits.append(user.records("merge")[0].start - last)
    return {"median": statistics.median(waits), "worst": max(waits)}


def status(cluster: SlurmCluster, place: Path, rounds: int) -> dict[str, object]:
    """Seconds of the command, and which programs of Slurm it called."""
    user = user_of(cluster, place, "status", tuple(f"e{number}" for number in range(57)))
    user.play(tokenize={"hold": 2})
    user.launch()
    real = Path(next(d for d in cluster.env["PATH"].split(":") if (Path(d) / "squeue").exists()))
    counted = user.folder / "counted"
    counted.mkdir()
    for program in PROGRAMS:
        (counted / program).write_text(COUNTING)
        (counted / program).chmod(0o755)
    calls = user.folder / "calls"
    calls.touch()
    env = user.env() | {"CALLS": str(calls), "REAL": str(real)}
    env["PATH"] = f"{counted}:{env['PATH']}"
    command = [sys.executable, "-m", "launcher", "status", "r", "--json"]
    taken, jobs = [], 0
    for _ in range(rounds):
        calls.write_text("")
        began = time.perf_counter()
        said = subprocess.run(command, cwd=user.folder, env=env, capture_output=True, text=True, check=True).stdout
        taken.append(time.perf_counter() - began)
        jobs = len(json.loads(said)["jobs"])
    cancel(cluster, user)
    seconds = {"median": round(statistics.median(taken), 3), "worst": round(max(taken), 3)}
    return {"status_jobs": jobs, "status_s": seconds, "status_calls": calls.read_text().split()}


def signals(cluster: SlurmCluster, place: Path, count: int) -> dict[str, object]:
    """How many of `count` jobs that were told to stop went on from their checkpoint, and the seconds until they did."""
    user = user_of(cluster, place, "signals")
    jobs = [f"distill-{name}" for name in EXPERTS]
    user.play(**{name.replace("-", "_"): {"steps": 10**6, "pause": 0.1} for name in jobs})
    user.launch("stage=distill")
    chance, waits, sent, lost = random.Random(0), [], 0, 0
    for name in jobs:
        user.until(lambda name=name: user.checkpoint(name) > 0)
    while sent < count:
        batch = jobs[: min(len(jobs), count - sent)]
        before = {name: len(user.starts(name)) for name in batch}
        began = time.monotonic()
        for name in batch:
            time.sleep(chance.random())
            cluster.run("scancel", "--signal=USR2", user.ids()[name])
            sent += 1
        for name in batch:
            user.until(lambda name=name, count=before[name]: len(user.starts(name)) > count, 120)
            waits.append(time.monotonic() - began)
            start = user.starts(name)[-1]
            lost += start["at"] == 0
            user.until(lambda name=name, at=start["at"]: user.checkpoint(name) > at, 60)
    cancel(cluster, user)
    return {"signals": sent, "resumed": len(waits) - lost, "resumed_after_s": round(statistics.median(waits), 1)}


def cancel(cluster: SlurmCluster, user: User) -> None:
    """End all jobs of a run."""
    cluster.run("scancel", *user.ids().values())


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    main()
