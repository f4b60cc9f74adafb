"""The generalist that merging has to beat (paper §4): one student on the mixtures of several experts together (pure).

It sees as many tokens as they do together, and each of their sources as often:

    tokens   = Σ_e tokens_e                          over the experts e of `expert.NAME.union_of`
    weight_s = Σ_e tokens_e · weight_{e,s} / tokens   of source s; one that several experts read is one source

So the union has sources of its own from here on, and nothing behind needs to know how it came by them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches

from launcher.budget import largest
from launcher.checks import same_source
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Config, Expert, Source

EVERY = "all"
"""In `union_of`: every expert that the run has, else every one that there is."""


def with_unions(config: Config) -> Config:
    """`config` with the mixture of every selected union worked out, and its `union_of` by name.

    Raises:
        Mistake: a union of nothing, of unknown experts, of unions, or one with sources of its own.
    """
    unions = {name: _union(config, name) for name in config.experts if _is_union(config, name)}
    return replace(config, expert={**config.expert, **unions}) if unions else config


def union_origins(given: Config, found: Config) -> dict[str, str]:
    """Where the values of the unions in `found` come from, by dotted key."""
    origins: dict[str, str] = {}
    for name, expert in found.expert.items():
        if expert is not given.expert[name]:
            words = f"union of {', '.join(expert.union_of)}"
            keys = [f"sources.{source}.{field}" for source, values in expert.sources.items() for field in vars(values)]
            origins |= {f"expert.{name}.{key}": words for key in ("union_of", *keys)}
    return origins


def _is_union(config: Config, name: str) -> bool:
    return name in config.expert and bool(config.expert[name].union_of)


def _union(config: Config, name: str) -> Expert:
    expert = config.expert[name]
    if expert.sources:
        raise Mistake(f"expert.{name}: has sources of its own and union_of; give one of them")
    members = tuple(_members(config, name))
    experts = [config.expert[member] for member in members]
    budgets = [max(1, config.distill_of(member).tokens) for member in members]  # 0 is refused behind
    first: dict[str, tuple[str, Source]] = {}
    for member in members:  # which need not be experts of the run, whose mixtures are checked
        for source, values in config.expert[member].sources.items():
            for problem in same_source(first, f"expert.{member}.sources", source, values):
                raise Mistake(problem)
    return replace(expert, union_of=members, sources=_mixture(experts, budgets))


def _members(config: Config, name: str) -> Iterator[str]:
    """Names of the experts in a union, each once."""
    wanted = config.expert[name].union_of
    known = [other for other in config.expert if not config.expert[other].union_of]
    if wanted == (EVERY,):
        wanted = tuple(other for other in config.experts if other in known) or tuple(known)
    if not wanted:
        raise Mistake(f"expert.{name}.union_of=[{EVERY}]: there is no other expert")
    for other in dict.fromkeys(wanted):
        if other not in known:
            nearest = get_close_matches(other, known, n=1, cutoff=0.0)
            reason = "a union itself" if _is_union(config, other) else "no such expert"
            raise Mistake(
                f"expert.{name}.union_of={other}: {reason}" + (f"; the nearest is {nearest[0]}" if nearest else "")
            )
        yield other


def _mixture(experts: list[Expert], budgets: list[int]) -> Mapping[str, Source]:
    """The experts' sources, each with its share of all their tokens."""
    total = sum(budgets)
    shares: dict[str, list[float]] = {}
    sources: dict[str, list[Source]] = {}
    for expert, budget in zip(experts, budgets, strict=True):
        for name, source in expert.sources.items():
            sources.setdefault(name, []).append(source)
            shares.setdefault(name, []).append(budget / total * source.weight)  # the same when all budgets grow alike
    return {
        name: replace(same[0], weight=math.fsum(shares[name]), tokens=largest([source.tokens for source in same]))
        for name, same in sources.items()
    }
