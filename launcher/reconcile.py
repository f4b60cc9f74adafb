"""What a launch has to do about each job, from how its folder and the scheduler's queue stand (pure)."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

from launcher.plan import Graph
from xlstm_distill.contract.state import State

PENDING, RUNNING = "PENDING", "RUNNING"
"""States of a job in the queue; an array of which any element has begun is running."""


@dataclass(frozen=True)
class Action:
    """What to do about a job."""

    kind: Literal["keep", "wait", "submit", "follow", "replace"]
    """`keep`: it is done; `wait`: it is in the queue as wanted; `submit` it; `follow`: it is in the queue and must wait
    for jobs that are submitted anew; `replace`: cancel it there, submit it anew."""
    why: str = ""
    """What to tell beside it."""


def reconcile(
    graph: Graph,
    standing: Mapping[str, State],
    queue: Mapping[str, str],
    placed_otherwise: Set[str],
    *,
    replace: bool = False,
) -> dict[str, Action]:
    """What to do about each job of `graph`, inputs first.

    Args:
        graph: what is wanted.
        standing: how each job's folder stands.
        queue: `PENDING` or `RUNNING` of each job that is in the queue.
        placed_otherwise: jobs of the queue whose script asks for another place than is wanted now.
        replace: whether waiting jobs of another placement are to be submitted anew.
    """
    actions: dict[str, Action] = {}
    for job in graph:
        inputs = {actions[name].kind for name in job.inputs if name in actions}
        anew = bool(inputs & {"submit", "replace"})
        state = queue.get(job.name)
        if standing[job.name].done:
            action = Action("keep")
        elif state is None:
            action = Action("submit")
        elif state == PENDING and job.name in placed_otherwise and replace:
            action = Action("replace", "its placement has changed")
        elif state == PENDING and "replace" in inputs:  # merge waits for an end, and a cancelled input has ended
            action = Action("replace", "what it waits for is submitted anew")
        elif state == PENDING and anew:
            action = Action("follow")
        else:
            action = Action("wait", _stale(job.name in placed_otherwise, state, anew))
        actions[job.name] = action
    return actions


def _stale(placed_otherwise: bool, state: str, inputs_are_new: bool) -> str:
    if state == RUNNING and inputs_are_new:
        return "it runs from inputs that are made anew: cancel it, or launch again when it has ended"
    if not placed_otherwise:
        return ""
    if state == RUNNING:
        return "it runs where it was placed before"
    return "it waits with the placement that it was submitted with; --cancel-obsolete submits it anew"


def obsolete(known: Mapping[str, str], graph: Graph, whole: Set[str]) -> list[str]:
    """Jobs of the queue that this configuration no longer has.

    Args:
        known: name → scheduler id of what is in the queue.
        graph: what is wanted now, perhaps a part of the pipeline.
        whole: names of all jobs that the configuration has.
    """
    return [name for name in known if name not in graph.names and name not in whole]
