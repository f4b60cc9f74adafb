"""When a head has lost one of its branches: what Stage I records and the report shows."""

from collections.abc import Sequence

SHUT = 1e-3
"""A head whose mean output gate is not between this and 1 − this is shut."""


def heads_shut(gates: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """(layer, head) of every shut head; `gates` holds the mean output gate of each head, layer by layer."""
    return [
        (layer, head) for layer, row in enumerate(gates) for head, gate in enumerate(row) if not SHUT < gate < 1 - SHUT
    ]
