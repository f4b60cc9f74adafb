"""Merging: time, memory and exactness of the `merge` stage, beside mergekit.

    python -m venv VENV && VENV/bin/pip install torch mergekit        # its requirements are not ours
    python benchmarks/merge.py --mergekit VENV [--rounds N] [--method ties] [--json]

Four experts of 269 MB each: SmolLM2-135M-Instruct in bfloat16 with noise of one percent of each tensor's deviation,
finished jobs of a run. Both sides are whole processes, from the start of Python to the end: ours is the job as `xdl`
starts it (every input hashed in the pass that merges it, the output on the disk, hashed, and its manifest written),
theirs `mergekit-yaml` on the same folders, in bfloat16, without any verification. In turn, one round of each to warm
the page cache, then `--rounds` that count. Printed: the median seconds of each, wall clock and processor, and the ratio
of the wall clocks; the peak of anonymous memory (RssAnon, looked at every 5 ms); and for `linear` how many elements
have other bits than a float32 sum in numpy, tensor by tensor, rounded once.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launcher.compose import compose
from launcher.plan import plan
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.schema import Merge
from xlstm_distill.contract.state import prepare
from xlstm_distill.stages import run_job

ROOT = Path(__file__).parents[1]
WEIGHTS = {"math": 0.35, "code": 0.35, "stem": 0.2, "chat": 0.1}
"""The paper's for Llama."""
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
INSTALL = "mergekit not measured: make a venv, VENV/bin/pip install torch mergekit, and give --mergekit VENV"


class Cost(NamedTuple):
    """Of one process."""

    seconds: float
    cpu: float
    """Seconds of all its threads."""
    anonymous: int
    """Peak of anonymous memory, bytes."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="venv that has it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", choices=METHODS, default="linear")
    parser.add_argument("--folder", type=Path, help="for 2.5 GB of models; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    command = options.mergekit / "bin" / "mergekit-yaml" if options.mergekit else None
    if command is None or not command.is_file():
        print(INSTALL, file=sys.stderr)
        command = None
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary, redirect_stdout(sys.stderr):
        found = measure(Path(temporary), options.method, options.rounds, command)
    print(json.dumps(found, indent=None if options.json else 2))


def measure(root: Path, method: str, rounds: int, mergekit: Path | None) -> dict[str, Any]:
    """The figures of one method."""
    job = make_run(root, method)
    students = [job.input(f"distill-{name}") / "student" for name in WEIGHTS]
    sides = {"ours": lambda: merge_ours(job)}
    if mergekit:
        sides["mergekit"] = lambda: merge_theirs(root, job.input("align") / "student", students, method, mergekit)
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    anonymous = dict.fromkeys(sides, 0)
    for number in range(rounds + 1):
        for name, side in sides.items():
            cost = side()
            anonymous[name] = max(anonymous[name], cost.anonymous)
            if number:
                costs[name].append(cost)
    found: dict[str, Any] = {
        "method": method,
        "experts": len(students),
        "bytes_each": weights_of(students[0]).stat().st_size,
    }
    for name in sides:
        found[f"{name}_s"] = round(statistics.median(cost.seconds for cost in costs[name]), 3)
        found[f"{name}_all_s"] = [round(cost.seconds, 3) for cost in costs[name]]
        found[f"{name}_cpu_s"] = round(statistics.median(cost.cpu for cost in costs[name]), 3)
        found[f"{name}_anonymous_gb"] = round(anonymous[name] / 1e9, 3)
    if mergekit:
        found["ratio"] = round(found["ours_s"] / found["mergekit_s"], 3)
    if method == "linear":
        found["bits_that_differ"] = different_bits(students, job.output / "student")
    return found


def make_run(root: Path, method: str) -> JobFolder:
    """A run of four finished experts; returns its merge job, ready to start."""
    config = compose(["stage=fetch", "experts=[math]", "data.shards=/nowhere", "cluster=local"]).config
    (job,) = plan(config, only=True)
    fetch = JobFolder(root / "jobs" / job.name, job, config)
    prepare(fetch.path, job)
    fetch.write()
    run_job(fetch.path)
    teacher = fetch.output / "teacher"
    experts = {name: replace(config.expert["math"], merge_weight=weight) for name, weight in WEIGHTS.items()}
    config = replace(config, stage="merge", experts=tuple(WEIGHTS), expert=experts, merge=Merge(method=method))  # type: ignore[arg-type]
    start = {name: tensor.bfloat16() for name, tensor in load_file(teacher / "model.safetensors").items()}
    finish_job(root, config, "align", teacher, start)
    for seed, name in enumerate(WEIGHTS):
        generator = torch.Generator().manual_seed(seed)
        noisy = {key: perturbed(tensor, generator) for key, tensor in start.items()}
        finish_job(root, config, f"distill-{name}", teacher, noisy)
    job = plan(config)["merge"]
    merge = JobFolder(root / "jobs" / "merge", job, config)
    merge.write()
    return merge


def perturbed(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`tensor` with noise."""
    noise = torch.randn(tensor.shape, generator=generator)
    return (tensor.float() + 0.01 * tensor.float().std() * noise).bfloat16()


def finish_job(root: Path, config: Any, name: str, source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A job whose output is `student/`."""
    folder = JobFolder(
        root / "jobs" / name, replace(plan(config)[name], inputs=("align",) if name != "align" else ()), config
    )
    student = folder.output / "student"
    shutil.copytree(source, student, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    folder.write()
    folder.finish({})


def merge_ours(job: JobFolder) -> Cost:
    """The job in a process of its own."""
    shutil.rmtree(job.output, ignore_errors=True)
    job.manifest_path.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return watched([sys.executable, "-m", "xlstm_distill", str(job.path)], environment)


def merge_theirs(root: Path, base: Path, students: list[Path], method: str, command: Path) -> Cost:
    """The same by mergekit."""
    models = [
        {"model": str(path), "parameters": {"weight": weight, **({} if method == "linear" else {"density": 0.2})}}
        for path, weight in zip(students, WEIGHTS.values(), strict=True)
    ]
    settings = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    (root / "mergekit.yaml").write_text(
        json.dumps(settings | ({} if method == "linear" else {"base_model": str(base)}))
    )
    shutil.rmtree(root / "theirs", ignore_errors=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    return watched([str(command), str(root / "mergekit.yaml"), str(root / "theirs")], environment)


def watched(command: list[str], environment: dict[str, str]) -> Cost:
    """Run a process to its end."""
    begin, before, peak = time.perf_counter(), os.times(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - begin
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{said.read().decode()[-2000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(seconds, cpu, peak)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def weights_of(student: Path) -> Path:
    """Its safetensors file."""
    return student / "model.safetensors"


def different_bits(students: list[Path], merged: Path) -> int:
    """Elements of the merge that are not the float32 sum of the students, rounded to bfloat16."""
    total = sum(WEIGHTS.values())
    shares = [np.float32(weight / total) for weight in WEIGHTS.values()]
    count = 0
    files = [safe_open(weights_of(path), framework="pt") for path in (*students, merged)]
    for name in files[0].keys():  # noqa: SIM118
        *parts, result = (file.get_tensor(name).view(torch.int16).numpy().view(np.uint16) for file in files)
        summed = shares[0] * widened(parts[0])
        for share, part in zip(shares[1:], parts[1:], strict=True):
            summed = summed + share * widened(part)
        count += int((rounded(summed) != result).sum())
    return count


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 → the bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


if __name__ == "__main__":
    main()
