"""Names of the evaluation's tasks that the launcher has to know: the local ones, and those that run generated code."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xlstm_distill.contract.schema import Config

PREFIX = "local_"
WITHOUT_SOURCE = ("recall", "addition")
PER_SOURCE = ("cloze", "words", "answers", "perplexity", "positions")
PER_LENGTH = ("needle_single", "needle_multi", "needle_single_choice", "needle_multi_choice")
CODE = ("humaneval", "mbpp", "cruxeval")
"""How the names of lm-eval's tasks begin whose answers are programs that are run."""
SHORTEST = 128
"""Tokens that the prompt of a needle task has at least."""


def local_names(sources: Iterable[str], lengths: Iterable[int] = ()) -> list[str]:
    """Names of all local tasks of a run with these data sources and lengths of needle tasks."""
    return [
        *(PREFIX + kind for kind in WITHOUT_SOURCE),
        *(f"{PREFIX}{kind}_{source}" for source in sources for kind in PER_SOURCE),
        *(f"{PREFIX}{kind}_{length}" for kind in PER_LENGTH for length in lengths),
    ]


def lengths_of(config: "Config") -> tuple[int, ...]:
    """Lengths of the needle tasks: as set, or from half a window on, doubled up to the length of a sample."""
    if config.eval.lengths:
        return config.eval.lengths
    first = max(SHORTEST, config.student.window // 2)
    doublings = range(max(1, (config.data.sequence // first).bit_length()))
    return tuple(first << doubling for doubling in doublings)


def expand(tasks: Iterable[str], sources: Sequence[str], lengths: Sequence[int]) -> tuple[str, ...]:
    """`tasks` with a local one that names no source, or no length, as one task for each: `local_cloze`,
    `local_needle_multi`."""
    found: list[str] = []
    for task in tasks:
        kind = task.removeprefix(PREFIX) if task.startswith(PREFIX) else ""
        endings = sources if kind in PER_SOURCE else lengths if kind in PER_LENGTH else None
        found += [task] if endings is None else [f"{task}_{ending}" for ending in endings]
    return tuple(dict.fromkeys(found))


def task_names(config: "Config") -> tuple[str, ...]:
    """The tasks that the run has, each by its full name."""
    return expand(config.eval.tasks, tuple(config.sources), lengths_of(config))


def runs_code(task: str) -> bool:
    """Whether answers to `task` are programs that have to be run."""
    return task.startswith(CODE)


def by_length(task: str) -> bool:
    """Whether what `task` asks depends on `eval.lengths`."""
    return task.startswith(tuple(PREFIX + kind for kind in ("positions", *PER_LENGTH)))


def source_of_positions(task: str) -> str:
    """The source of a `local_positions_SOURCE`; empty for another task."""
    begin = f"{PREFIX}positions_"
    return task.removeprefix(begin) if task.startswith(begin) else ""
