"""Configuration → graph of jobs (pure), and how each stands on disk.

A job's **identity** is every setting that changes its own output and that it does not inherit from an input: inputs are
compared by the digests of their manifests. Token budgets, micro-batches, cadences, workers, threads, placement and
strategy are not part of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checks import STAGES
from launcher.compose import leaves
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import Job, JobFolder, plain
from xlstm_distill.contract.schema import Config, Placement, Source
from xlstm_distill.contract.state import State, covers, recorded_identity, state_of

OPTIMISER = ("batch", "lr", "min_lr", "schedule", "warmup", "clip")
"""Settings of a training stage that change what it makes, but for the budget."""
SPIKES = ("spike_sigma",)
"""Settings of the guard that do."""
STUDENT = (
    "window", "sinks", "feature_map", "feature_rope", "gate_input", "input_gate_soft_cap", "output_gate_bias",
    "reset_at_documents", "use_window", "use_gates",
)  # fmt: skip
"""Settings of the student that change what it computes."""
FETCHED = ("hub", "demo")
"""Kinds of sources that `fetch` brings; the others are read where they lie."""


@dataclass(frozen=True)
class Graph:
    """Jobs in an order in which each comes after its inputs."""

    jobs: tuple[Job, ...]

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)

    def __getitem__(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(job.name for job in self.jobs)

    @property
    def edges(self) -> list[tuple[str, str]]:
        """(input, job) for every edge inside the graph."""
        return [(name, job.name) for job in self.jobs for name in job.inputs if name in self.names]


def plan(config: Config, *, only: bool = False) -> Graph:
    """The jobs of `config.stage` and all their ancestors, or with `only` the stage's alone.

    Raises:
        Mistake: the stage has no job under this configuration.
    """
    jobs = {job.name: job for job in all_jobs(config)}
    wanted = [job.name for job in jobs.values() if config.stage in (job.stage, "pipeline")]
    if not wanted:
        raise Mistake(f"stage={config.stage}: this configuration has no such job; it has {', '.join(jobs)}")
    if not only:
        wanted = list(_with_ancestors(wanted, jobs))
    return Graph(tuple(job for job in jobs.values() if job.name in wanted))


def _with_ancestors(names: Iterable[str], jobs: Mapping[str, Job]) -> set[str]:
    found: set[str] = set()
    pending = list(names)
    while pending:
        if (name := pending.pop()) not in found:
            found.add(name)
            pending += jobs[name].inputs
    return found


def all_jobs(config: Config) -> Iterator[Job]:
    """Every job that the configuration has, inputs first."""
    for stage in STAGES:
        for job in _jobs_of(config, stage):
            yield replace(job, identity=plain(job.identity), placement=config.cluster.stages.get(stage, Placement()))


def _jobs_of(config: Config, stage: str) -> Iterator[Job]:
    inputs = _inputs(config)
    experts = tuple(f"distill-{name}" for name in config.experts)
    sources = tuple(config.sources)
    if stage == "distill":
        for name in config.experts:
            identity = _distill_identity(config, name)
            yield Job(f"distill-{name}", stage, identity, inputs[stage], name, tokens=config.distill.tokens)
    elif stage not in inputs or (stage in ("merge", "eval", "report") and not experts):
        return
    else:
        pieces = {"tokenize": sources, "cache": sources, "eval": models(config)}.get(stage, ())
        tokens = config.align.tokens if stage == "align" else 0
        yield Job(stage, stage, _IDENTITY[stage](config), inputs[stage], pieces=pieces, tokens=tokens)


def _inputs(config: Config) -> dict[str, tuple[str, ...]]:
    """Inputs of each stage that this configuration has: the edges of the graph."""
    experts = tuple(f"distill-{name}" for name in config.experts)
    tokens = () if config.data.shards else ("tokenize",)
    aligned = () if config.student.init_from else ("align",)
    cached = config.distill.targets == "cached"
    edges: dict[str, tuple[str, ...]] = {"fetch": ()}
    if tokens:
        edges["tokenize"] = ("fetch",)
    if cached:
        edges["cache"] = ("fetch", *tokens)
    if aligned:
        edges["align"] = ("fetch", *tokens)
    edges["distill"] = ("fetch", *aligned, *(("cache",) if cached else tokens))
    edges["merge"] = experts
    edges["eval"] = ("fetch", *tokens, *aligned, *experts, "merge")
    edges["report"] = ("eval", *aligned, *experts, "merge")
    return edges


def models(config: Config) -> tuple[str, ...]:
    """Models that `eval` scores, in the order of the report's table."""
    students = () if config.student.init_from else ("window", "aligned")
    every = ("teacher", *students, *config.experts, "merged")
    chosen = config.eval.models or every
    if missing := [name for name in chosen if name not in every]:
        raise Mistake(f"eval.models={missing[0]}: this run does not make it (student.init_from is given)")
    return tuple(name for name in every if name in chosen)


def _flat(value: Any, prefix: str, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """`{"prefix.key": value}` of a dataclass, all of it or some keys."""
    found = dict(leaves(asdict(value), prefix))
    return {k: v for k, v in found.items() if keys is None or k.removeprefix(f"{prefix}.") in keys}


def _sources(sources: Mapping[str, Source]) -> dict[str, Any]:
    """What each source is, but for its weight in a mixture."""
    return {
        k: v for name, s in sources.items() for k, v in _flat(s, f"sources.{name}").items() if not k.endswith(".weight")
    }


def _weights(sources: Mapping[str, Source], prefix: str) -> dict[str, Any]:
    return {f"{prefix}.{name}.weight": source.weight for name, source in sources.items()}


def _shards(config: Config) -> dict[str, Any]:
    """Shards that come as a path have no manifest to compare, so the path itself counts."""
    return _flat(config.data, "data", ("shards", "sequence")) if config.data.shards else {}


def _fetch_identity(config: Config) -> dict[str, Any]:
    fetched = {name: source for name, source in config.sources.items() if source.kind in FETCHED}
    teacher = _flat(config.teacher, "teacher", ("source", "path", "revision", "gguf_file"))
    return {**teacher, **({} if config.data.shards else _sources(fetched))}


def _tokenize_identity(config: Config) -> dict[str, Any]:
    return {**_flat(config.data, "data", ("sequence", "validation", "shard_bytes")), **_sources(config.sources)}


def _cache_identity(config: Config) -> dict[str, Any]:
    return {
        **_shards(config),
        **_flat(config.cache, "cache", ("top_k", "max_samples")),
        **_flat(config.student, "student", ("reset_at_documents",)),
    }


def _optimiser(config: Config) -> dict[str, Any]:
    return {**_flat(config.adamw, "adamw"), **_flat(config.guard, "guard", SPIKES)}


def _align_identity(config: Config) -> dict[str, Any]:
    return {
        **_flat(config.student, "student", STUDENT),
        **_flat(config.align, "align", OPTIMISER),
        **_optimiser(config),
        "seed": config.seed,
        **_shards(config),
        **_weights(config.data.sources, "data.sources"),
    }


def _distill_identity(config: Config, expert: str) -> dict[str, Any]:
    own = (*OPTIMISER, "mixer_lr", "targets", "loss", "gamma", "beta")
    online_top_k = config.distill.targets == "online" and config.distill.loss != "full"
    return {
        **_flat(config.distill, "distill", own),
        **_optimiser(config),
        **({"cache.top_k": config.cache.top_k} if online_top_k else {}),
        **_flat(config.student, "student", ("reset_at_documents",)),
        **({"student.init_from": config.student.init_from} if config.student.init_from else {}),
        "seed": config.seed,
        **(_shards(config) if config.distill.targets == "online" else {}),
        **_weights(config.expert[expert].sources, f"expert.{expert}.sources"),
    }


def _merge_identity(config: Config) -> dict[str, Any]:
    weights = {f"expert.{name}.merge_weight": config.expert[name].merge_weight for name in config.experts}
    return {**_flat(config.merge, "merge"), "experts": list(config.experts), **weights}


def _eval_identity(config: Config) -> dict[str, Any]:
    return {
        **_flat(config.eval, "eval", ("tasks", "limit", "samples")),
        "eval.models": models(config),
        **_shards(config),
    }


_IDENTITY = {
    "fetch": _fetch_identity,
    "tokenize": _tokenize_identity,
    "cache": _cache_identity,
    "align": _align_identity,
    "merge": _merge_identity,
    "eval": _eval_identity,
    "report": lambda config: {},
}


def states(graph: Graph, jobs_folder: Path) -> dict[str, State]:
    """How each job stands below `runs/NAME/jobs`; one whose input is still to be made (again) is not done either.

    Raises:
        Mistake: a folder holds a job of other settings.
    """
    found: dict[str, State] = {}
    for job in graph:
        state = state_of(jobs_folder / job.name, job)
        pending = [name for name in job.inputs if name in found and not found[name].done]
        if state.done and pending:
            state = State("outdated", f"{pending[0]} will be made again")
        found[job.name] = state
    return found


def as_recorded(job: Job, folder: Path) -> Job:
    """`job` with the identity and pieces that its folder records where these serve it: a run that was fetched for two
    experts and is asked for one of them keeps what it has."""
    recorded = recorded_identity(folder)
    if recorded is None or recorded == plain(job.identity) or not covers(recorded, job.identity):
        return job
    return replace(job, identity=recorded, pieces=JobFolder.read(folder).job.pieces)
