"""How a stage ends: the exit codes that the launcher and the batch scripts act on, and the exceptions behind them."""

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
