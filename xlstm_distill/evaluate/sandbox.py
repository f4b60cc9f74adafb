"""Programs that a model wrote, run apart: pass or fail. The one place of the project that runs generated code.

Each program has a process of its own (`sandbox_child.py`) with an empty environment, limits on time, memory, processes
and files, and, in namespaces of the kernel, without network and with every folder read-only but a small one in memory.
Where the kernel gives no namespaces to ordinary users nothing is run, unless the settings say `unconfined`: then the
limits alone hold, and the program has the network and the files of the user.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake

CHILD = Path(__file__).with_name("sandbox_child.py")
SECONDS = 5
"""Of computing, for one program."""
MEMORY = 2 << 30
"""Bytes of addresses that a program may have; numpy takes a quarter of it."""
DISK = 16 << 20
"""Bytes that it may write, in all."""
START_SECONDS = 5.0
"""That an interpreter may take to start, on a busy machine, and a program to wait for something."""


@dataclass(frozen=True)
class Outcome:
    """What came of a program."""

    passed: bool
    """Whether it reached its end."""
    why: str = ""
    """Why not, in one line."""


class NoNamespaces(Exception):
    """This kernel gives an ordinary user no namespaces; the message is its reason."""


def run_program(program: str, confine: bool = True, seconds: int = SECONDS) -> Outcome:
    """Run a program to its end.

    Args:
        program: Python text; its assertions are the tests.
        confine: in namespaces; else with limits only.
        seconds: that it may take.

    Raises:
        NoNamespaces: with `confine`, where there are none.
    """
    token = secrets.token_hex(16)
    order = {"program": program, "token": token, "seconds": seconds, "memory": MEMORY, "disk": DISK, "confine": confine}
    with tempfile.TemporaryDirectory(prefix="xdl-program-", ignore_cleanup_errors=True) as folder:
        answer, code = _start(order, folder, seconds + START_SECONDS)
    if answer == token:
        return Outcome(True)
    if answer.startswith(token):
        raise NoNamespaces(answer.removeprefix(token).strip())
    if code in (None, 128 + signal.SIGKILL, 128 + signal.SIGXCPU):
        return Outcome(False, f"killed: not at its end after {seconds} s")
    return Outcome(False, answer or f"ended early (exit code {code})")


def _start(order: dict[str, Any], folder: str, seconds: float) -> tuple[str, int | None]:
    """What the child answered within so many seconds, and its exit code; None: it was killed."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    code: int | None = None
    with os.fdopen(reading, "rb", buffering=0) as answers:
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        try:
            process.communicate(json.dumps({**order, "answer": writing}).encode(), timeout=seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return (answers.read(4096) or b"").decode("utf-8", "replace"), code


def _environment(folder: str) -> dict[str, str]:
    """Nothing of this process's own, but what an interpreter from a module may need to start."""
    variables = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
    variables |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return variables | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def check_sandbox(allowed: bool | str) -> None:
    """Refuse to go on where generated programs cannot be run as the settings want it.

    Args:
        allowed: `eval.allow_code_execution`.

    Raises:
        Mistake: they may not be run, the kernel gives no namespaces, or a right program does not pass.
    """
    if not allowed:
        raise Mistake(
            "eval.allow_code_execution=false: a task runs programs that the model writes; "
            "allow it with eval.allow_code_execution=true, or leave the task out"
        )
    try:
        outcome = run_program("import math, re, numpy\nassert numpy.sort([2, 1])[0] == 1", allowed != "unconfined")
    except NoNamespaces as error:
        raise Mistake(
            f"eval.allow_code_execution=true: this kernel gives ordinary users no namespaces ({error}), so programs "
            "that the model writes would have network and files; evaluate elsewhere, leave the tasks out, or accept it "
            "with eval.allow_code_execution=unconfined"
        ) from error
    if not outcome.passed:
        raise Mistake(f"eval.allow_code_execution: even a right program does not pass here ({outcome.why})")


class PassAt1:
    """A metric of lm-eval: the share of the answers to an item that pass its tests."""

    __name__ = "pass@1"

    def __init__(self, confine: bool, tested: bool = False) -> None:
        """Args: whether in namespaces; whether an answer has its tests in it already, as CRUXEval's."""
        self.confine, self.tested = confine, tested

    def __call__(self, references: Sequence[str], predictions: Sequence[Any], **ignored: Any) -> float:
        """Run every answer with its tests below.

        Args:
            references: tests of the item, one text.
            predictions: its answers, one text or several.
        """
        answers = [predictions[0]] if isinstance(predictions[0], str) else list(predictions[0])
        programs = answers if self.tested else [f"{answer}\n{references[0]}" for answer in answers]
        return sum(run_program(program, self.confine).passed for program in programs) / len(programs)
