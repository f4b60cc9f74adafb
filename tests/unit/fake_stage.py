"""Stands for `python -m xlstm_distill JOB_DIR` where the launcher is tested: counts to 5, a step every `FAKE_STEP`
seconds and a checkpoint after each, honours the stop file and TERM, and writes a manifest. `FAKE_FAIL=JOB:CODE` makes a
job fail."""

import os
import signal
import sys
import time
from pathlib import Path

from xlstm_distill.contract.job import JobFolder
from xlstm_distill.runtime.metrics import Metrics

STEPS = 5
asked = []


def main(path: Path) -> int:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: asked.append(1))
    folder = JobFolder.read(path)
    folder.input_digests()
    job, _, code = os.environ.get("FAKE_FAIL", "").partition(":")
    print(f"{folder.job.name} runs, offline={os.environ.get('HF_HUB_OFFLINE', '0')}", flush=True)
    if job == folder.job.name:
        print("error: the fake mistake" if code == "2" else "Traceback: the fake crash", file=sys.stderr)
        return int(code)
    latest = folder.checkpoints / "latest"
    first = int(latest.read_text()) if latest.exists() else 0
    folder.checkpoints.mkdir(exist_ok=True)
    folder.output.mkdir(exist_ok=True)
    with Metrics(folder.path, STEPS, resume_at=first) as metrics, (folder.path / "steps").open("a") as steps:
        for step in range(first + 1, STEPS + 1):
            time.sleep(float(os.environ.get("FAKE_STEP", "0")))
            metrics.log(step, {"loss": 1 / step, "tokens_per_s": 100.0})
            steps.write(f"{step}\n")
            latest.write_text(str(step))
            if asked or folder.stop_file.exists():
                return 75
    for piece in folder.job.pieces or ("",):
        (folder.output / piece).mkdir(exist_ok=True)
        (folder.output / piece / "result.txt").write_text(f"{folder.job.identity}\n")
        if piece:
            folder.finish({}, piece)
    if folder.job.name == "report":
        (folder.output / "summary.txt").write_text("the table of the report\n")
    folder.finish({})
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
