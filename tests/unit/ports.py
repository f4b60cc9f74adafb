"""Ports for servers of a test."""

import random
import socket
from contextlib import suppress


def free_ports(count: int, first: int) -> list[int]:
    """Different ports of the 5000 from `first` that nobody listens on; give them below those that the kernel gives to
    whoever connects."""
    found: set[int] = set()
    while len(found) < count:
        with socket.socket() as taken, suppress(OSError):
            taken.bind(("", random.SystemRandom().randrange(first, first + 5000)))
            found.add(taken.getsockname()[1])
    return list(found)
