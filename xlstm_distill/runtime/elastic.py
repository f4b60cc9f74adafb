"""`python -m xlstm_distill.runtime.elastic RANKS JOB_DIR`: the ranks of a job on one machine, through torch's elastic
launch, and the first failing rank's own exit code (torchrun gives 1 for every failure, also for a stop by request)."""

import ctypes
import os
import signal
import sys
import uuid

from xlstm_distill.contract.exitcode import DONE

DIE_WITH_PARENT = "XDL_DIE_WITH_PARENT"
PR_SET_PDEATHSIG = 1
STOP_SECONDS = 600
"""From a TERM to this process until the ranks are killed: for their checkpoint."""
FAILED_SECONDS = 5
"""The same after a rank has failed: the others can save nothing without it, and a stopped process heeds no TERM."""


def die_with_parent() -> None:
    """In a rank that `launch` started: be killed when the launching process dies, so that no two runs ever write."""
    if os.environ.get(DIE_WITH_PARENT) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def launch(ranks: int, job_folder: str) -> int:
    """Run `ranks` processes of the job to their end.

    Returns:
        0, or the exit code of the rank that failed first (128 + n for a signal n).
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
    )
    # What ends the others when a rank has failed waits 30 s, whatever the shutdown timeout: that one is for signals.
    PContext.close.__defaults__ = (None, FAILED_SECONDS)
    os.environ[DIE_WITH_PARENT] = "1"  # the ranks lead sessions of their own: nobody else would end them
    try:
        elastic_launch(config, sys.executable)("-m", "xlstm_distill", job_folder)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return DONE


if __name__ == "__main__":
    sys.exit(launch(int(sys.argv[1]), sys.argv[2]))
