"""A stage that sleeps and checkpoints: no torch, a tenth of a second to start.

The file that `STAND_IN` names tells how, by job (`""`: the others), and is read at every start:

    {"distill-math": {"steps": 5, "pause": 0.1, "hold": 3, "crash": 2, "times": 1, "mistake": true, "rank": 1,
                      "element": 0}}

`hold`: before this step, wait until JOB/go stands. `crash`: before the so-manieth step after each start, on this rank
(and element), at the first `times` starts. `mistake`: end with 2 at once. Each start adds a line to JOB/starts.
"""

import json
import os
import time
from pathlib import Path

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.files import append_line, read_lines, write_atomic
from xlstm_distill.contract.state import TRAINING
from xlstm_distill.runtime.metrics import Metrics

STEPS, PAUSE = 3, 0.05


def play(folder, world, stop):
    """What `xlstm_distill.stages` calls in place of a stage."""
    plan = json.loads(Path(os.environ["STAND_IN"]).read_text())
    role = plan.get(folder.job.name, plan.get("", {}))
    if folder.job.stage == "merge":
        _verify(folder)
    number = len([line for line in read_lines(folder.path / "starts") if line["element"] == world.element])
    latest = folder.checkpoints / "latest"
    first = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
    if world.rank == 0:
        record = {"element": world.element, "ranks": world.size, "at": first, "pid": os.getpid(), "time": time.time()}
        append_line(folder.path / "starts", {**record, "host": os.uname().nodename})
    if role.get("mistake"):
        raise Mistake(f"{folder.job.name}: the stand-in's mistake")
    crashes = role.get("rank", 0) == world.rank and role.get("element", 0) == world.element
    crashes = crashes and number < role.get("times", 1_000_000)
    stop.expect(0)
    steps, trains = role.get("steps", STEPS), folder.job.stage in TRAINING
    with Metrics(folder.path, steps, resume_at=first if trains else None, enabled=world.rank == 0) as metrics:
        for step in range(first + 1, steps + 1):
            _wait(folder, role, step, stop)
            if crashes and role.get("crash") == step - first:
                raise RuntimeError(f"the stand-in's crash before step {step}")
            if world.rank == 0:
                metrics.log(step, {"loss": 1 / step})
                if trains:
                    write_atomic(latest, f"step-{step}")
            if _asked(stop):
                raise Stopped(f"stopped after step {step}")
    if world.rank == 0:
        _finish(folder, world)
    return {"steps": steps}


def _wait(folder, role, step, stop):
    if step == role.get("hold"):
        while not (folder.path / "go").exists() and not _asked(stop):
            time.sleep(0.1)
    time.sleep(role.get("pause", PAUSE))


def _asked(stop):
    """`stop.requested()` without its torch: Slurm tells every rank."""
    return stop.signalled or stop._file_stands() or stop._near_deadline()


def _finish(folder, world):
    for piece in folder.my_pieces(world) or [""]:
        write_atomic(folder.output / piece / "result", f"{folder.job.name} {piece}\n")
        if piece:
            folder.finish({}, piece)


def _verify(folder):
    from xlstm_distill.merge.verify import verify_experts  # what the real one does first is real here too

    verify_experts(folder)
