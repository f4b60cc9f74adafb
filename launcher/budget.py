"""How many tokens of each source are fetched, tokenised and cached: what the trainings and evaluations draw of it.

    tokens = 1.05 · max(most tokens that one training draws / (1 − v), held-out tokens that are looked at / v)

where v is `data.validation`. Trainings read the same shards, so the largest counts. It is worked out where nothing else
is said, and stands in `sources.NAME.tokens` from here on.

A budget is no part of a job's identity, as those of trainings are none. A smaller one is served by what is there. A
larger one is refused in a line: more text makes everything behind it anew, and the user decides whether to have that
or the same text more often.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from xlstm_distill.contract.budget import is_bounded, share_of
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.manifest import Manifest, read_manifest
from xlstm_distill.contract.schema import Config, Source, pieces_of
from xlstm_distill.contract.state import TRAINING, State

MARGIN = 1.05
"""Samples have to be whole, and a mixture takes its shares to within half a per cent."""
ALL, DRAWN = 0, -1
"""`tokens`: all that there are; what is drawn."""


def with_budgets(config: Config) -> Config:
    """`config` with a number in `tokens` of every source of the run; unchanged where nothing is tokenised.

    Args:
        config: checked, its unions worked out.
    """
    if config.data.shards:
        return config
    found = {name: _tokens(config, name) for name in config.sources}
    experts = {
        name: replace(config.expert[name], sources=_bounded(config.expert[name].sources, found))
        for name in config.experts
    }
    data = replace(config.data, sources=_bounded(config.data.sources, found))
    return replace(config, data=data, expert={**config.expert, **experts})


def budget_origins(given: Config, found: Config) -> dict[str, str]:
    """Where the budgets that `found` has beyond `given` come from, by dotted key."""
    mixtures = {"data.sources": (given.data.sources, found.data.sources)}
    for name in given.experts:
        mixtures[f"expert.{name}.sources"] = (given.expert[name].sources, found.expert[name].sources)
    return {
        f"{key}.{name}.tokens": _why(given, name)
        for key, (before, after) in mixtures.items()
        for name, source in before.items()
        if source.tokens != after[name].tokens
    }


def _why(config: Config, name: str) -> str:
    """Why a source has the budget that `_tokens` gives it."""
    if _stated(config, name):
        return "of another mixture"
    return "all of it" if _tokens(config, name) == ALL else "what is drawn of it"


def _bounded(sources: Mapping[str, Source], tokens: Mapping[str, int]) -> dict[str, Source]:
    return {name: replace(source, tokens=tokens[name]) for name, source in sources.items()}


def _tokens(config: Config, name: str) -> int:
    """The largest budget that a mixture gives a source, else what is drawn of it."""
    if stated := _stated(config, name):
        return largest(stated)
    source = config.sources[name]
    if source.kind == "demo" or source.limit:  # its size is chosen already
        return ALL
    held = config.data.validation
    evaluated = config.eval.samples * (2 if config.merge.search else 1)  # a search looks at others than the evaluation
    looked_at = max(evaluated, config.align.validation_samples, config.distill.validation_samples)
    return math.ceil(MARGIN * max(drawn(config, name) / (1 - held), looked_at * config.data.sequence / held))


def largest(budgets: Sequence[int]) -> int:
    """The largest of the budgets that mixtures give one source."""
    return ALL if ALL in budgets else max(budgets)


def _stated(config: Config, name: str) -> list[int]:
    """The budgets that mixtures give a source."""
    mixtures = (config.data.sources, *(config.expert[expert].sources for expert in config.experts))
    return [mixture[name].tokens for mixture in mixtures if name in mixture and mixture[name].tokens != DRAWN]


def drawn(config: Config, name: str) -> float:
    """Most tokens of a source that one training draws. They all read the same shards."""
    return max(_drawn(config, name), default=0.0)


def _drawn(config: Config, name: str) -> Iterator[float]:
    """By each training that has the source in its mixture."""
    if name in config.data.sources and not config.student.init_from and config.student.kind == "hybrid":
        yield config.align.tokens * config.data.sources[name].weight
    for expert in config.experts:
        if name in config.expert[expert].sources:
            yield config.distill_of(expert).tokens * config.expert[expert].sources[name].weight


def shortages(jobs: Sequence[tuple[Job, State]], config: Config, folder: Path) -> list[str]:
    """A line about sources of which less was fetched or tokenised than is wanted now; none where all that trains is
    done, and none about what is made anew.

    Args:
        jobs: of the graph, and how they stand.
        config: of the run.
        folder: `runs/NAME/jobs`.
    """
    trainings = [state for job, state in jobs if job.stage in TRAINING]
    if config.data.shards or (trainings and all(state.done for state in trainings)):
        return []
    standing = {job.name: state.kind for job, state in jobs}
    if standing.get("fetch", "done") != "done":  # it brings what is wanted, from which all is tokenised
        return []
    fetched = read_manifest(folder / "fetch" / "manifest.json")
    if fetched is None:
        return []
    if found := dict(_fetched_short(fetched, config)):
        return [_told("fetch", found)]
    if standing.get("tokenize") == "new":
        return []
    found = dict(_tokenised_short(folder / "tokenize" / "pieces", fetched, config))
    return [_told("tokenize", found)] if found else []


def _fetched_short(fetched: Manifest, config: Config) -> Iterator[tuple[str, int]]:
    """Sources of which not enough text was fetched, each with the tokens for which it was."""
    stopped = fetched.facts.get("stopped_at", {})
    for name, source in config.sources.items():
        if name in stopped and not 0 < source.tokens <= stopped[name]:
            yield name, stopped[name]


def _tokenised_short(pieces: Path, fetched: Manifest, config: Config) -> Iterator[tuple[str, int]]:
    """Sources of which a piece of this text ended too early, each with the tokens at which the source did."""
    for name, source in config.sources.items():
        manifests = [read_manifest(pieces / f"{piece}.json") for piece in pieces_of(name, source)]
        made = [m for m in manifests if m and m.inputs.get("fetch") == fetched.digest]
        ends = [end for manifest in made if (end := manifest.facts.get("stopped_at", 0))]
        if ends and (not is_bounded(source) or min(ends) < share_of(source)):
            yield name, min(ends) * source.parts


def _told(job: str, found: Mapping[str, int]) -> str:
    first, *others = found
    more = f" (and of {', '.join(others)})" if others else ""
    return (
        f"{job}: stopped at {found[first]} tokens of {first}, and more are wanted now{more}; --restart {job} makes "
        f"it and all behind it anew with more, --force goes on with these, seen more often"
    )
