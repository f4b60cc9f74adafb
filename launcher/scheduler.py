"""How jobs stand with Slurm: one call of squeue for all that is asked, and one of sacct for what squeue has forgotten.

squeue shows ended jobs too (`--states=all`) as long as the controller remembers them (MinJobAge), so that most ends are
known without accounting, and scontrol is not needed.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ANSWER_SECONDS = 5.0
"""After which a command of Slurm counts as not answering where people only look: it would wait for minutes."""
PATIENT_SECONDS = 60.0
"""The same where something is done about the jobs."""
PENDING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
"""States of a job that waits."""
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
     "TIMEOUT"}
)  # fmt: skip
"""States of a job that does not come back by itself; one that is preempted and requeued is pending."""


@dataclass(frozen=True)
class Task:
    """A job, or an element of an array; elements that wait stand together."""

    id: str
    """As squeue writes it: `12`, `12_3`, `12_[4-7%1]`."""
    state: str
    """Slurm's word: PENDING, RUNNING, …"""
    reason: str = ""
    """Why it waits, or why it ended; empty: none."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def waits(self) -> bool:
        return self.state in PENDING


@dataclass(frozen=True)
class Sight:
    """What Slurm says about some jobs."""

    answered: bool
    """Whether squeue answered."""
    why: str = ""
    """Why not."""
    tasks: Mapping[str, Sequence[Task]] = field(default_factory=dict)
    """By the job's id, of an array the whole array's. An id that is not there is in no queue and on no record."""

    def of(self, id: str | None) -> Sequence[Task]:
        """The tasks of a job."""
        return self.tasks.get(id or "", ())


def look(ids: Iterable[str], seconds: float | None = None) -> Sight:
    """Ask Slurm about these jobs: one squeue, and one sacct where some are forgotten and sacct is here.

    Args:
        ids: of jobs, of arrays the whole array's.
        seconds: to wait for an answer of each; None: `ANSWER_SECONDS`.
    """
    wanted, seconds = list(dict.fromkeys(ids)), seconds or ANSWER_SECONDS
    if not wanted:
        return Sight(True)
    several = wanted if len(wanted) > 1 else wanted * 2  # about one unknown job squeue complains
    text, why = _ask(
        ["squeue", "-h", "-a", "--states=all", f"--jobs={','.join(several)}", "-o", "%i|%F|%T|%r"], seconds
    )
    if text is None:
        return Sight(False, why)
    tasks = _tasks(text)
    if forgotten := [id for id in wanted if id not in tasks]:
        options = ["-n", "-P", "-X", f"--jobs={','.join(forgotten)}", "-o", "JobID,State,Reason"]
        text, _ = _ask(["sacct", *options], seconds)
        recorded = _tasks("\n".join(map(_like_squeue, (text or "").splitlines())))
        # What squeue does not know is not alive, though its end may not have reached the accounting.
        tasks |= {id: ended for id, found in recorded.items() if (ended := [task for task in found if task.ended])}
    return Sight(True, "", tasks)


def _ask(command: Sequence[str], seconds: float) -> tuple[str | None, str]:
    """What a command prints, or None and why it says nothing."""
    name = command[0]
    if not shutil.which(name):
        return None, f"no {name} here"
    # SQUEUE_USERS and their like are defaults of what is shown.
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=variables)
    except subprocess.TimeoutExpired:
        return None, f"{name} does not answer"
    except OSError as error:
        return None, f"{name}: {error.strerror}"
    if answer.returncode:
        return None, f"{name} does not answer ({' '.join(answer.stderr.split())})"
    return answer.stdout, ""


def _tasks(text: str) -> dict[str, list[Task]]:
    found: dict[str, list[Task]] = {}
    for line in text.splitlines():
        id, array, state, reason = [*line.split("|", 3), "", "", ""][:4]
        found.setdefault(array, []).append(Task(id, state, "" if reason in ("None", "N/A") else reason))
    return found


def _like_squeue(line: str) -> str:
    """A line of sacct (`12_3|CANCELLED by 0|None`) as squeue would write it."""
    id, state, reason = [*line.split("|", 2), "", ""][:3]
    return f"{id}|{id.partition('_')[0]}|{state.split()[0] if state else ''}|{reason}"
