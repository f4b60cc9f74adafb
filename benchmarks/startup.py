"""CPU seconds of `xdl --help` above `python -c pass`, measured in turn: `python benchmarks/startup.py [TIMES]`."""

import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence


def cpu_seconds(command: Sequence[str]) -> float:
    """User and system time of one run of `command`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def above_python(times: int) -> tuple[float, float]:
    """Medians over `times` runs: (seconds of `python -c pass`, seconds of `xdl --help` above it)."""
    python, xdl = [sys.executable, "-c", "pass"], [sys.executable, "-m", "launcher", "--help"]
    cpu_seconds(python), cpu_seconds(xdl)  # fill the page cache and __pycache__
    pairs = [(cpu_seconds(python), cpu_seconds(xdl)) for _ in range(times)]
    bare = statistics.median(pair[0] for pair in pairs)
    return bare, statistics.median(pair[1] - pair[0] for pair in pairs)


if __name__ == "__main__":
    bare, above = above_python(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    print(f"python -c pass {bare:.3f} s CPU; xdl --help {above:.3f} s above it ({(bare + above) / bare:.1f} x)")
