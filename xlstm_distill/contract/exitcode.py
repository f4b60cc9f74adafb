"""How a stage ends: the exit codes that the launcher and the batch scripts act on, and the exceptions behind them."""

import errno

DONE = 0
"""The manifest is written."""
MISTAKE = 2
"""The user's mistake: one line on stderr, no retry."""
STUCK = 70
"""No step for too long: the watchdog named the rank in the log and ended this process. A crash, to be started again."""
STOPPED = 75
"""Stopped by request (a signal, a `stop` file, the time limit); the checkpoint is durable, start again to go on."""


class Mistake(Exception):
    """Something that the user has to mend. The message is one line: what, where, what to do. Ends with `MISTAKE`."""


class Stopped(Exception):
    """Raised by a loop after its checkpoint is durable. Ends with `STOPPED`."""


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the user has to mend: no room, or no right to write."""


def disk_mistake(error: OSError, place: str) -> str:
    """One line about a full or forbidden disk; empty where `error` is about something else.

    Args:
        error: as it was raised.
        place: what was written to, where the error does not say.
    """
    if error.errno not in DISK:
        return ""
    return f"{error.filename or place}: {error.strerror}; make room or give the rights, and launch again"
