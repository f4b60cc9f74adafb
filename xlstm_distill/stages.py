"""`python -m xlstm_distill JOB_DIR`: a stage's name → its function, and how it ends."""

import errno
import importlib
import os
import sys
import traceback
from pathlib import Path

from xlstm_distill.contract.exitcode import DONE, MISTAKE, STOPPED, Mistake, Stopped
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.runtime.elastic import die_with_parent
from xlstm_distill.runtime.stop import StopFlag
from xlstm_distill.runtime.watchdog import flight_recorder

STAGES = {
    "fetch": "xlstm_distill.data.fetch:run",
    "tokenize": "xlstm_distill.data.tokenize:run",
    "cache": "xlstm_distill.teacher.capture:run",
    "align": "xlstm_distill.train.align:run",
    "distill": "xlstm_distill.train.distill:run",
    "merge": "xlstm_distill.merge:run",
    "eval": "xlstm_distill.evaluate.harness:run",
    "report": "xlstm_distill.evaluate.report:run",
}
"""Each function takes (folder, world, stop) and returns the facts for the manifest, on every rank."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the user has to mend: no room, or no right to write."""


def run_job(path: Path) -> None:
    """Run the stage of the job folder `path` to its manifest.

    Raises:
        Mistake: the user has to mend something.
        Stopped: a stop was requested; what was done is durable.
    """
    folder, world = JobFolder.read(path), World.from_environment()
    stop = StopFlag(folder.stop_file)
    flight_recorder(folder.logs)
    folder.input_digests()
    folder.output.mkdir(parents=True, exist_ok=True)
    module, function = STAGES[folder.job.stage].split(":")
    facts = getattr(importlib.import_module(module), function)(folder, world, stop)
    missing = [piece for piece in folder.job.pieces if not folder.piece_done(piece)]
    if world.rank == 0 and not missing:
        folder.finish(facts if not folder.job.pieces else piece_facts(folder))


def piece_facts(folder: JobFolder) -> dict[str, object]:
    """The facts of each piece by name."""
    manifests = {piece: read_manifest(folder.piece_path(piece)) for piece in folder.job.pieces}
    return {piece: manifest.facts for piece, manifest in manifests.items() if manifest}


def main(arguments: list[str]) -> int:
    """Run one job and return its exit code."""
    if len(arguments) != 1:
        print("usage: python -m xlstm_distill JOB_DIR", file=sys.stderr)
        return MISTAKE
    die_with_parent()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run_job(Path(arguments[0]))
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE
    except OSError as error:
        if error.errno not in DISK:
            traceback.print_exc()
            return 1
        place = error.filename or arguments[0]
        print(f"error: {place}: {error.strerror}; make room or give the rights, and launch again", file=sys.stderr)
        return MISTAKE
    except Stopped as error:
        print(error, file=sys.stderr, flush=True)
        return STOPPED
    except Exception:
        traceback.print_exc()
        return 1
    return DONE
