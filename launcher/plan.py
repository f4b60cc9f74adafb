"""Configuration → graph of jobs (pure), and how each stands on disk.

A job's **identity** is every setting that changes its own output and that it does not inherit from an input: inputs are
compared by the digests of their manifests. Token budgets, micro-batches, cadences, workers, threads, placement and
strategy are not part of it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checks import STAGES
from launcher.compose import leaves
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import Job, JobFolder, plain
from xlstm_distill.contract.schema import Config, Placement, Source, pieces_of
from xlstm_distill.contract.state import State, covers, recorded_identity, state_of
from xlstm_distill.contract.tasks import by_length, expand, lengths_of

OPTIMISER = ("batch", "lr", "min_lr", "schedule", "warmup", "clip")
"""Settings of a training stage that change what it makes, but for the budget."""
SPIKES = ("spike_sigma",)
"""Settings of the guard that do."""
STUDENT = (
    "window", "sinks", "feature_map", "feature_rope", "gate_input", "input_gate_soft_cap", "output_gate_bias",
    "forget_gate_bias", "reset_at_documents", "use_window", "use_gates",
)  # fmt: skip
"""Settings of the student that change what it computes."""
ANNEALED = ("beta_end", "temperature_end", "hidden")
"""Settings of Stage II that only Distil-xLSTM has."""
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
    parts = tuple(piece for name, source in config.sources.items() for piece in pieces_of(name, source))
    if stage == "distill":
        for name in config.experts:
            identity = _distill_identity(config, name)
            tokens = config.distill_of(name).tokens
            yield Job(f"distill-{name}", stage, identity, inputs[stage], name, tokens=tokens)
    elif stage not in inputs:
        return
    else:
        pieces = {"tokenize": parts, "cache": parts, "eval": models(config)}.get(stage, ())
        tokens = config.align.tokens if stage == "align" and config.student.kind == "hybrid" else 0
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
        edges["align"] = ("fetch", *(tokens if config.student.kind == "hybrid" else ()))
    edges["distill"] = ("fetch", *aligned, *(("cache",) if cached else tokens))
    if specialists := tuple(f"distill-{name}" for name in config.specialists):
        steps = aligned if set(config.merge.tried) != {"linear"} else ()
        held_out = ("fetch", *tokens) if config.merge.search else ()
        edges["merge"] = (*held_out, *steps, *specialists)
    students = (*aligned, *experts, *(("merge",) if specialists else ()))
    if experts:
        edges["eval"] = ("fetch", *tokens, *students)
        edges["report"] = ("eval", *students)
    return edges


def models(config: Config) -> tuple[str, ...]:
    """Models that `eval` scores, in the order of the report's table."""
    hybrid = config.student.kind == "hybrid"
    students = () if config.student.init_from or not hybrid else ("window", "aligned")
    every = ("teacher", *students, *config.experts, *(("merged",) if config.specialists else ()))
    chosen = config.eval.models or every
    if missing := [name for name in chosen if name not in every]:
        given = "student.init_from is given" if hybrid else f"student.kind is {config.student.kind}"
        why = "no expert is merged" if missing[0] == "merged" else given
        raise Mistake(f"eval.models={missing[0]}: this run does not make it ({why})")
    return tuple(name for name in every if name in chosen)


def _flat(value: Any, prefix: str, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """`{"prefix.key": value}` of a dataclass, all of it or some keys."""
    found = dict(leaves(asdict(value), prefix))
    return {k: v for k, v in found.items() if keys is None or k.removeprefix(f"{prefix}.") in keys}


def _sources(sources: Mapping[str, Source], prefix: str = "sources") -> dict[str, Any]:
    """What each source is, but for its weight in a mixture and its budget (`launcher.budget` looks after that)."""
    flat = (item for name, source in sources.items() for item in _flat(source, f"{prefix}.{name}").items())
    return {key: value for key, value in flat if not key.endswith((".weight", ".tokens"))}


def _weights(sources: Mapping[str, Source], prefix: str) -> dict[str, Any]:
    return {f"{prefix}.{name}.weight": source.weight for name, source in sources.items()}


def _shards(config: Config) -> dict[str, Any]:
    """Shards that come as a path have no manifest to compare, so the path itself counts."""
    return _flat(config.data, "data", ("shards", "sequence")) if config.data.shards else {}


def _fetch_identity(config: Config) -> dict[str, Any]:
    teacher = _flat(config.teacher, "teacher", ("source", "path", "revision", "gguf_file"))
    if config.data.shards:
        return teacher
    data, texts = (
        {name: source for name, source in sources.items() if source.kind in FETCHED}
        for sources in (config.sources, config.eval.texts)
    )
    brought = {**_sources(texts, "eval.texts"), **_sources(data)}
    return {**teacher, **{key: value for key, value in brought.items() if not key.endswith(".parts")}}


def _tokenize_identity(config: Config) -> dict[str, Any]:
    looked_for = {**_flat(config.data, "data", ("overlap",)), **_sources(config.eval.texts, "eval.texts")}
    return {
        **_flat(config.data, "data", ("sequence", "validation", "shard_bytes")),
        **(looked_for if config.eval.texts else {}),
        **_sources(config.sources),
    }


def _cache_identity(config: Config) -> dict[str, Any]:
    # Of its own shards the parts are in `tokenize`'s identity. Another number of them is another meaning of `NAME/0`.
    parts = {f"sources.{name}.parts": source.parts for name, source in config.sources.items() if source.parts != 1}
    return {
        **_shards(config),
        **(parts if config.data.shards else {}),
        **_flat(config.cache, "cache", ("top_k", "max_samples")),
        "cache.sampler": config.sampler,
        **({"seed": config.seed} if config.sampler != "topk" else {}),
        **_flat(config.student, "student", ("reset_at_documents",)),
    }


def _optimiser(config: Config) -> dict[str, Any]:
    return {**_flat(config.adamw, "adamw"), **_flat(config.guard, "guard", SPIKES)}


def _align_identity(config: Config) -> dict[str, Any]:
    if config.student.kind != "hybrid":  # nothing is trained
        return {"student.kind": config.student.kind, "seed": config.seed}
    return {
        **_flat(config.student, "student", STUDENT),
        **{f"student.layer_windows.{layers}": window for layers, window in config.student.layer_windows.items()},
        **_flat(config.align, "align", OPTIMISER),
        **_optimiser(config),
        "seed": config.seed,
        **_shards(config),
        **_weights(config.data.sources, "data.sources"),
    }


def _distill_identity(config: Config, expert: str) -> dict[str, Any]:
    own = (*OPTIMISER, "mixer_lr", "targets", "divergence", "temperature", "gamma", "beta")
    online_top_k = config.distill.targets == "online" and config.loss != "full"
    return {
        **_flat(config.distill, "distill", own),
        **(_flat(config.distill, "distill", ANNEALED) if config.student.kind == "distil_xlstm" else {}),
        "distill.loss": config.loss,
        **_optimiser(config),
        **({"cache.top_k": config.cache.top_k} if online_top_k else {}),
        **_flat(config.student, "student", ("reset_at_documents",)),
        **({} if config.student.kind == "hybrid" else {"student.kind": config.student.kind}),
        **({"student.init_from": config.student.init_from} if config.student.init_from else {}),
        "seed": config.seed,
        **(_shards(config) if config.distill.targets == "online" else {}),
        **_weights(config.expert[expert].sources, f"expert.{expert}.sources"),
    }


def _merge_identity(config: Config) -> dict[str, Any]:
    merge, names, tried = config.merge, config.specialists, set(config.merge.tried)
    if merge.search:
        chosen = {
            **_flat(merge, "merge", ("search", "tasks")),
            "merge.methods": merge.tried,
            **_flat(config.eval, "eval", ("samples",)),
            **(_asked(config, merge.tasks) if merge.tasks else {}),
            **_shards(config),
        }
    else:
        weights = {f"expert.{name}.merge_weight": config.expert[name].merge_weight for name in names}
        parts = dict(leaves(merge.weights, "merge.weights")) if merge.weights else {}
        chosen = {"merge.method": merge.method, **weights, **parts}
    thins, draws = tried & {"ties", "dare_linear", "dare_ties"}, tried & {"dare_linear", "dare_ties"}
    return {
        **chosen,
        **(_flat(merge, "merge", ("scale",)) if tried != {"linear"} else {}),
        **(_flat(merge, "merge", ("density",)) if thins else {}),
        **({"seed": config.seed} if draws else {}),
        "experts": list(names),
    }


def _eval_identity(config: Config) -> dict[str, Any]:
    return {
        **_flat(config.eval, "eval", ("tasks", "samples")),
        **_asked(config, config.eval.tasks),
        "eval.models": models(config),
        **_shards(config),
    }


def _asked(config: Config, tasks: Sequence[str]) -> dict[str, Any]:
    """How these tasks are asked."""
    settings, names = config.eval, expand(tasks, tuple(config.sources), lengths_of(config))
    return {
        "eval.limit": settings.limit,
        **{f"eval.shots.{task}": count for task, count in settings.shots.items() if task in names},
        **{f"eval.max_new_tokens.{task}": count for task, count in settings.max_new_tokens.items() if task in names},
        **({"eval.chat": True} if settings.chat else {}),
        **({"eval.lengths": lengths_of(config)} if any(map(by_length, tasks)) else {}),
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


def states(graph: Graph, jobs_folder: Path, anew: Collection[str] = ()) -> dict[str, State]:
    """How each job stands below `runs/NAME/jobs`; one whose input is still to be made (again) is not done either.

    Args:
        graph: what is wanted.
        jobs_folder: `runs/NAME/jobs`.
        anew: jobs that will be made anew, whatever stands in their folders.

    Raises:
        Mistake: a folder holds a job of other settings.
    """
    found: dict[str, State] = {}
    for job in graph:
        state = State("new") if job.name in anew else state_of(jobs_folder / job.name, job)
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
