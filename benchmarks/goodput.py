"""Goodput of a small training under random kills, beside what theory predicts for its checkpoint interval.

    python benchmarks/goodput.py [--minutes 6] [--mtbf 30] [--json out.json]

A Stage II job with a random tiny teacher runs as on a cluster, `python -m xlstm_distill JOB`, is killed (SIGKILL) after
exponentially distributed times, at once started again, and stopped by its `stop` file when the time is up. First a run
without kills gives the seconds of a step and of a save until it is durable (δ); the interval follows from δ and the
mean time between failures M:

    τ = √(2δM)·[1 + ⅓·√(δ/2M) + δ/18M] − δ  for δ < 2M, else M
    goodput = τ / (M·e^(R/M)·(e^((τ+δ)/M) − 1))

J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
Systems 22 (2006): the interval, and the expected time of the complete model, inverted. The prediction takes the run's
own step, R (from the birth of a process that resumes to its first step) and M (as the kills came about). In the formula
a save holds up the work for all of δ; here it is written in the background. Measured: `contract/ledger.py`, `goodput`.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xlstm_distill.contract import ledger
from xlstm_distill.contract.exitcode import DONE, STOPPED
from xlstm_distill.contract.files import read_lines
from xlstm_distill.contract.job import Job, JobFolder
from xlstm_distill.contract.schema import Config, Data, Distill, Expert, Source, Strategy, Student, Teacher
from xlstm_distill.data.shards import sample, shard_writer
from xlstm_distill.model import convert
from xlstm_distill.runtime.metrics import read_metrics
from xlstm_distill.train.checkpoint import latest

SEQUENCE, BATCH, VOCABULARY = 128, 4, 512
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
EVERY, CYCLES = 20, 3
"""The run without kills: steps per checkpoint, checkpoints before and after its resumption."""


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    step: float
    save: float
    """δ: from the start of a save until it is durable."""
    held: float
    """What of it held up the steps."""
    restart: float
    """R: from the birth of a process that resumes to its first step."""


def interval(save: float, mtbf: float) -> float:
    """Daly's optimum τ: seconds of work between checkpoints."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def expected_goodput(work: float, save: float, restart: float, mtbf: float) -> float:
    """Work ÷ expected wall time, with a checkpoint after each `work` seconds."""
    return work / (mtbf * math.exp(restart / mtbf) * math.expm1((work + save) / mtbf))


def main() -> None:
    """Calibrate, kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--mtbf", type=float, default=30.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--place", type=Path, help="folder to work in; default: the system's for temporary files")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        jobs = make_run(Path(place))
        quiet = calibrate(jobs)
        every = max(1, round(interval(quiet.save, options.mtbf) / quiet.step))
        print(
            f"step {quiet.step * 1e3:.0f} ms, save {quiet.save * 1e3:.0f} ms, of which it holds up the steps for "
            f"{quiet.held * 1e3:.0f} ms, restart {quiet.restart:.1f} s: checkpoint every {every} steps "
            f"({every * quiet.step:.1f} s) for a kill each {options.mtbf:.0f} s",
            flush=True,
        )
        folder = make_job(jobs, "killed", steps=10**7, every=every)
        result = survive(folder, options)
        costs = costs_of(folder.path, quiet.save)
    work, mtbf = every * costs.step, result["mtbf"]
    predicted, hidden = (expected_goodput(work, save, costs.restart, mtbf) for save in (costs.save, costs.held))
    ratio = result["goodput"] / predicted
    print(
        f"{result['kills']:.0f} kills in {result['wall']:.0f} s (one each {mtbf:.1f} s), restarts of "
        f"{costs.restart:.1f} s, {result['steps']:.0f} steps of {costs.step * 1e3:.0f} ms kept, {result['lost']:.0f} s "
        f"of steps lost\n"
        f"goodput {result['goodput']:.3f}, predicted {predicted:.3f}, ratio {ratio:.3f} (target: at least 0.9); "
        f"predicted {hidden:.3f} if a save cost only what it holds up"
    )
    if options.json:
        found = vars(costs) | result | {"every": every, "predicted": predicted, "hidden": hidden, "ratio": ratio}
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


def make_run(place: Path) -> Path:
    """Folder of jobs with a random teacher as if fetched, its student, and shards of random tokens."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    teacher = place / "jobs" / "fetch" / "output" / "teacher"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE)).save_pretrained(teacher)
    (place / "student").mkdir()
    convert(teacher, place / "student", window=32, sinks=4)
    for split, count in (("train", 256), ("validation", 8)):
        folder = place / "shards" / "noise" / split
        folder.parent.mkdir(parents=True, exist_ok=True)
        with shard_writer(folder, SEQUENCE, 1 << 20) as writer:
            for _ in range(count):
                tokens = rng.integers(0, VOCABULARY, SEQUENCE + 1)
                writer.write(sample(tokens, np.ones(SEQUENCE + 1), np.zeros(SEQUENCE + 1)))
    return place / "jobs"


def make_job(jobs: Path, name: str, steps: int, every: int) -> JobFolder:
    """Folder of a Stage II job with online targets."""
    place, sources = jobs.parent, {"noise": Source(path="noise")}
    config = Config(
        teacher=Teacher(name="tiny", family="llama", source="folder", path=""),
        experts=("noise",),
        student=Student(init_from=str(place / "student"), window=32),
        data=Data(shards=str(place / "shards"), sources=sources, sequence=SEQUENCE),
        expert={"noise": Expert(sources=sources)},
        distill=Distill(
            tokens=steps * BATCH * SEQUENCE, batch=BATCH, micro_batch=BATCH, targets="online", validate_every=0,
            validation_samples=4, checkpoint_every=every, lr=1e-4,
        ),
        strategy=Strategy(precision="float32"),
    )  # fmt: skip
    folder = JobFolder(jobs / name, Job(name, "distill", {"seed": 0}, expert="noise"), config)
    folder.output.mkdir(parents=True, exist_ok=True)
    folder.write()
    return folder


def start(folder: JobFolder) -> subprocess.Popen[bytes]:
    """The job's process, its output to a log."""
    folder.logs.mkdir(exist_ok=True)
    with (folder.logs / "rank-0.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "xlstm_distill", str(folder.path)], stdout=log, stderr=log)


def check(folder: JobFolder, code: int, expected: int) -> None:
    """Raises RuntimeError with the end of the log when the job ended with another code than expected."""
    if code != expected:
        raise RuntimeError(f"exit code {code}\n{(folder.logs / 'rank-0.log').read_text(errors='replace')[-2000:]}")


def calibrate(jobs: Path) -> Costs:
    """A run without kills, and its resumption with a larger budget. The save after the last step is waited for."""
    saves = []
    for number in (1, 2):
        folder = make_job(jobs, "unharmed", number * EVERY * CYCLES, EVERY)
        check(folder, start(folder).wait(), DONE)
        saves.append(read_lines(folder.path / ledger.NAME)[-1]["time"] - read_metrics(folder.path)[-1]["time"])
    return costs_of(folder.path, statistics.mean(saves))


def costs_of(folder: Path, save: float) -> Costs:
    """What the kept records of a run and its starts say; `save`: δ."""
    by_step = {int(r["step"]): r for r in read_metrics(folder) if "seconds" in r}
    starts = ledger.starts(folder)
    births = [start["time"] for start in starts] + [math.inf]
    restarts = []
    for start, following in zip(starts[1:], births[2:], strict=True):
        first = by_step.get(start["step"] + 1)  # made by a later process, if this one got to no checkpoint
        if first and start["time"] < first["time"] < following:
            restarts.append(first["time"] - first["seconds"] - start["time"])
    held = [r["time/checkpoint"] for r in by_step.values() if r["time/checkpoint"]]
    step = statistics.median(r["seconds"] for r in by_step.values())
    return Costs(step, save, statistics.mean(held), statistics.mean(restarts))


def survive(folder: JobFolder, options: argparse.Namespace) -> dict[str, float]:
    """Kill and restart until the time is up, then stop; what came of it."""
    chance, kills, lost = random.Random(options.seed), 0, 0.0
    deadline = time.monotonic() + 60 * options.minutes
    while True:
        process, left, born = start(folder), deadline - time.monotonic(), time.time()
        life = chance.expovariate(1 / options.mtbf)
        with suppress(subprocess.TimeoutExpired):
            check(folder, process.wait(min(life, max(left, 0.0))), STOPPED)
        if life >= left:
            break
        process.kill()
        process.wait()
        kills, lost = kills + 1, lost + lost_seconds(folder, born)
    folder.stop_file.touch()
    check(folder, process.wait(), STOPPED)
    wall, steps = ledger.wall_seconds(folder.path), len([r for r in read_metrics(folder.path) if "seconds" in r])
    return {
        "goodput": ledger.goodput(folder.path), "wall": wall, "kills": kills, "steps": steps,
        "mtbf": wall / max(kills, 1), "lost": lost,
    }  # fmt: skip


def lost_seconds(folder: JobFolder, born: float) -> float:
    """Of the steps that a killed process, alive since `born`, had made beyond its newest checkpoint."""
    newest = latest(folder.checkpoints)
    kept = int(newest.name.removeprefix("step-")) if newest else 0
    records = [r for r in read_metrics(folder.path) if "seconds" in r]
    return sum(r["seconds"] for r in records if r["step"] > kept and r["time"] > born)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
