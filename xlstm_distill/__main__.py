"""`python -m xlstm_distill JOB_DIR` runs one stage; further names start what belongs around it.

    prepare JOB_DIR     ready a job folder before its ranks start; exit code 3: the job is done already
    report …            scores → Markdown, HTML, plots
    gate …              scores → exit code
    generate …          text from a student
    export …            a student as a Hugging Face folder
    checkup FOLDER      one rank of `xdl doctor --nodes N`

Each is imported when it is asked for.
"""

import importlib
import os
import sys
from pathlib import Path

from xlstm_distill.contract.exitcode import DONE, MISTAKE, Mistake, disk_mistake

COMMANDS = {
    "report": "xlstm_distill.evaluate.report",
    "gate": "xlstm_distill.evaluate.gate",
    "generate": "xlstm_distill.evaluate.generate",
    "export": "xlstm_distill.export",
    "checkup": "xlstm_distill.runtime.checkup",
}
"""Name → module whose `main(arguments)` returns an exit code."""
ALREADY_DONE = 3
"""Exit code of `prepare` for a finished job, so that spare segments end in a second."""


def main(arguments: list[str]) -> int:
    """Run what `arguments` names and return the exit code."""
    if arguments and arguments[0] in COMMANDS:
        return _command(COMMANDS[arguments[0]], arguments[1:])
    if arguments and arguments[0] == "prepare":
        return _prepare(arguments[1:])
    redirect()
    from xlstm_distill.stages import main as run

    code = run(arguments)
    leave(code)
    return code


def leave(code: int) -> None:
    """End this process at once where a process group still stands, as after a stop.

    Its threads abort the interpreter's shutdown (SIGABRT in place of `code`) when a peer is gone first.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(module: str, arguments: list[str]) -> int:
    try:
        return int(importlib.import_module(module).main(arguments) or DONE)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


def _prepare(arguments: list[str]) -> int:
    from xlstm_distill.contract.job import JobFolder
    from xlstm_distill.contract.state import prepare

    try:
        folder = JobFolder.read(Path(arguments[0]))
        return ALREADY_DONE if prepare(folder.path, folder.job).done else DONE
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except OSError as error:
        if not (line := disk_mistake(error, arguments[0])):
            raise
        print(f"error: {line}", file=sys.stderr)
        return MISTAKE


def redirect() -> None:
    """Send stdout and stderr, C libraries' included, to `$XDL_LOGS/rank-R.log`, where the launcher sets XDL_LOGS; those
    of one array element of several to `rank-R.element-A.log`."""
    if not (folder := os.environ.get("XDL_LOGS")):
        return
    element = f".element-{os.environ['XDL_ELEMENT']}" if os.environ.get("XDL_ELEMENT") else ""
    path = Path(folder) / f"rank-{os.environ.get('RANK', '0')}{element}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
