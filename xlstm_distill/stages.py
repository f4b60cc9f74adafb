"""`python -m xlstm_distill JOB_DIR`: a stage's name → its function, and how it ends."""

import importlib
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from xlstm_distill.contract.exitcode import DONE, MISTAKE, STOPPED, Mistake, Stopped, disk_mistake
from xlstm_distill.contract.job import UNFINISHED, JobFolder, World
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
    "merge": "xlstm_distill.merge.stage:run",
    "eval": "xlstm_distill.evaluate.harness:run",
    "report": "xlstm_distill.evaluate.report:run",
}
"""Each function takes (folder, world, stop) and returns the facts for the manifest, on every rank.

Where finished pieces have to be joined, its module has `join_pieces(folder)` besides; whoever writes the manifest calls
it right before. Two may do so at once, so it renames whole files into place, the same ones each time.
"""


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
    stage = importlib.import_module(module)
    facts = getattr(stage, function)(folder, world, stop)
    if any(not folder.piece_done(piece) for piece in folder.job.pieces):
        return  # other elements are at work
    if world.rank:
        wait_for_manifest(folder)
        return
    try:
        getattr(stage, "join_pieces", lambda folder: None)(folder)
        folder.finish(facts if not folder.job.pieces else piece_facts(folder))
    except BaseException:
        with suppress(OSError):
            (folder.path / UNFINISHED).touch()
        raise


def wait_for_manifest(folder: JobFolder) -> None:
    """Stay until rank 0 has hashed the output, which takes minutes for a large one: `srun --wait` counts from the first
    rank that leaves. It ends this one where rank 0 dies without a word."""
    while not (folder.manifest_path.exists() or (folder.path / UNFINISHED).exists()):
        time.sleep(0.2)


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
        if not (line := disk_mistake(error, arguments[0])):
            traceback.print_exc()
            return 1
        print(f"error: {line}", file=sys.stderr)
        return MISTAKE
    except Stopped as error:
        print(error, file=sys.stderr, flush=True)
        return STOPPED
    except Exception:
        traceback.print_exc()
        return 1
    return DONE
