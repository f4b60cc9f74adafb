"""What the schema's types cannot say: values that cannot work, each with the key, the value and the range (pure)."""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import get_args, get_type_hints

from xlstm_distill.contract.devices import DEVICES, find_device
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.parts import problem_of
from xlstm_distill.contract.schema import DEMO_DOCUMENTS, SAMPLERS, Config, Merge, Placement, Source, Training
from xlstm_distill.contract.state import TRAINING
from xlstm_distill.contract.tasks import PREFIX, SHORTEST, expand, lengths_of, local_names, runs_code

STAGES = tuple(stage for stage in get_args(get_type_hints(Config)["stage"]) if stage != "pipeline")
"""Names of the stages, in the order of the pipeline."""
LONGEST_NAME = 100
MOST_PARTS = 64
MOST_CANDIDATES = 1000
_PLACED = "is set by cluster.stages.STAGE.{}"
_MADE = "is made by xdl"
OURS = {
    **dict.fromkeys(("nodes", "cpus-per-task", "time"), _PLACED.format("…")),
    "mem": _PLACED.format("memory"),
    "signal": "is set by cluster.signal_seconds",
    **dict.fromkeys(("ntasks", "ntasks-per-node"), _PLACED.format("nodes and gpus_per_node")),
    **dict.fromkeys(("cluster", "clusters"), "is not supported: submit from a login node of that cluster"),
    **dict.fromkeys(
        ("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "no-requeue", "open-mode",
         "output", "parsable", "requeue", "test-only", "wait", "wrap"),
        _MADE,
    ),
}  # fmt: skip
"""Options of sbatch that a site cannot set, and why."""


def check(config: Config) -> None:
    """Raise for the first thing in `config` that cannot work, wherever it runs.

    Raises:
        Mistake: one line.
    """
    for problem in problems(config):
        raise Mistake(problem)


def misplaced(config: Config, stages: Collection[str] = TRAINING) -> Iterator[str]:
    """One line per training stage of these whose batch cannot be shared by its ranks (a dry run tells, a launch
    refuses)."""
    for stage in (stage for stage in TRAINING if stage in stages):
        settings, ranks = getattr(config, stage), ranks_of(config.cluster.stages.get(stage, Placement()))
        if settings.batch < ranks:
            yield f"{stage}.batch={settings.batch}: {ranks} ranks need a sample each; expected {ranks} or more"


def unasked_code(config: Config, stages: Collection[str]) -> Iterator[str]:
    """One line per stage among these that scores a student by programs and may not run them (a dry run tells, a launch
    refuses)."""
    for stage in ("merge", "eval"):
        code = [task for task in getattr(config, stage).tasks if runs_code(task)]
        if stage in stages and code and not config.eval.allow_code_execution:
            yield (
                f"{stage}.tasks: {', '.join(code)}: run programs that the model writes; allow it with "
                "eval.allow_code_execution=true (in a sandbox), or leave them out"
            )


def problems(config: Config) -> Iterator[str]:
    """One line per thing that cannot work."""
    yield from _experts(config)
    yield from _names(config)
    yield from _student(config)
    yield from _data(config)
    yield from _at_least(0, seed=config.seed)
    for stage in TRAINING:
        yield from _training(stage, getattr(config, stage))
        step = getattr(config, stage).batch * config.data.sequence
        if 0 < getattr(config, stage).tokens < step:
            yield f"{stage}.tokens={getattr(config, stage).tokens}: less than one step; expected {step} or more"
    yield from _optimiser(config)
    yield from _distil_xlstm(config)
    yield from _distillation(config)
    yield from _places(config)
    yield from _evaluation(config)
    yield from _merging(config)


def _at_least(low: float, **values: float) -> Iterator[str]:
    for key, value in values.items():
        if not value >= low or math.isinf(value):
            yield f"{key.replace('__', '.')}={value}: expected {low} or more"


def _between(low: float, high: float, why: str = "", **values: float) -> Iterator[str]:
    for key, value in values.items():
        if not low <= value <= high:
            yield f"{key.replace('__', '.')}={value}: expected {low} to {high}{why}"


def _names(config: Config) -> Iterator[str]:
    yield from bad_name("name", config.name or config.teacher.name)
    known = [config.expert[name].sources for name in config.experts if name in config.expert]
    for name in (*config.experts, *(name for mixture in (config.data.sources, *known) for name in mixture)):
        yield from bad_name("expert or source", name)
    reserved = {"teacher", "window", "aligned", "merged"}
    for name in config.experts:
        if name in reserved:
            yield f"experts={name}: the name is taken by a model of the evaluation; call the expert otherwise"


def bad_name(key: str, name: str) -> Iterator[str]:
    """A name becomes a folder, part of a scheduler's job name and a word on command lines."""
    if not name:
        yield f"{key}: empty"
    elif name[0] in "-." or "/" in name or not name.isprintable():
        yield f"{key}={name!r}: not fit for a folder; no slash, no control character, no leading dash or dot"
    elif len(name.encode()) > LONGEST_NAME:
        yield f"{key}={name[:20]}…: {len(name.encode())} bytes long; at most {LONGEST_NAME}"


def _student(config: Config) -> Iterator[str]:
    student, teacher = config.student, config.teacher
    yield from _at_least(1, student__window=student.window, student__chunk=student.chunk)
    yield from _at_least(0, student__sinks=student.sinks)
    if len(student.forget_gate_bias) != 2:
        yield f"student.forget_gate_bias={list(student.forget_gate_bias)}: expected two numbers, as [3.0,6.0]"
    yield from _at_least(1, **{f"student__layer_windows__{key}": w for key, w in student.layer_windows.items()})
    if teacher.num_hidden_layers:
        try:
            student.windows(teacher.num_hidden_layers)
        except ValueError as error:
            yield f"student.{error}"
    if not 0 < student.input_gate_soft_cap <= 40:
        yield f"student.input_gate_soft_cap={student.input_gate_soft_cap}: expected more than 0, at most 40"
    if teacher.num_key_value_heads and teacher.num_attention_heads % teacher.num_key_value_heads:
        yield (
            f"teacher.num_key_value_heads={teacher.num_key_value_heads}: "
            f"does not divide num_attention_heads={teacher.num_attention_heads}"
        )


def _experts(config: Config) -> Iterator[str]:
    needed = config.stage in ("distill", "merge", "eval", "report", "pipeline")
    known = list(config.expert)
    for name in config.experts:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"the nearest is {nearest[0]} (all: {', '.join(known)})" if known else "this recipe has none"
            yield f"experts={name}: no such expert; {hint}"
        elif not config.expert[name].sources:
            yield f"expert.{name}.sources: empty; name at least one source"
    if len(set(config.experts)) < len(config.experts):
        yield f"experts=[{','.join(config.experts)}]: a name stands twice"
    if needed and not config.experts:
        yield f"experts=[]: stage={config.stage} needs at least one of {', '.join(known) or 'expert.NAME'}"
    merged = [config.expert[name] for name in config.experts if name in config.expert]
    weights = [expert.merge_weight for expert in merged if not expert.union_of]
    if any(not weight >= 0 for weight in weights) or (weights and not sum(weights) > 0):
        yield f"expert.*.merge_weight={weights}: expected 0 or more, and not all 0"


def _data(config: Config) -> Iterator[str]:
    data, teacher, student = config.data, config.teacher, config.student
    if data.sequence < 1 or (student.chunk > 0 and data.sequence % student.chunk):
        yield f"data.sequence={data.sequence}: expected a multiple of student.chunk={student.chunk}"
    if teacher.max_position_embeddings and data.sequence > teacher.max_position_embeddings:
        yield f"data.sequence={data.sequence}: the teacher was made for at most {teacher.max_position_embeddings}"
    if not 0 < data.validation < 1:
        yield f"data.validation={data.validation}: expected a fraction between 0 and 1, both excluded"
    yield from _at_least(1 << 16, data__shard_bytes=data.shard_bytes)
    if not data.sources:
        yield "data.sources: empty; name at least one source"
    mixtures = {"data.sources": data.sources}
    mixtures |= {
        f"expert.{name}.sources": config.expert[name].sources for name in config.experts if name in config.expert
    }
    for name, source in config.eval.texts.items():
        yield from bad_name("eval.texts", name)
        yield from _source(f"eval.texts.{name}", source)
        if source.parts != 1:
            yield f"eval.texts.{name}.parts={source.parts}: they are read by every piece, whole; expected 1"
        if source.tokens > 0:
            yield f"eval.texts.{name}.tokens={source.tokens}: they are looked for whole; leave it out"
    defined: dict[str, tuple[str, Source]] = {}
    for key, mixture in mixtures.items():
        yield from _mixture(config, key, mixture)
        for name, source in mixture.items():
            yield from same_source(defined, key, name, source)


def _mixture(config: Config, key: str, mixture: Mapping[str, Source]) -> Iterator[str]:
    total = math.fsum(source.weight for source in mixture.values())
    if mixture and not abs(total - 1) <= 1e-6:
        parts = ", ".join(f"{name} {source.weight:.6g}" for name, source in mixture.items())
        yield (
            f"{key}.*.weight: the weights sum to {total:.6g} ({parts}); they have to sum to 1 "
            f"('~{key}.NAME' takes one out)"
        )
    for name, source in mixture.items():
        if not source.weight >= 0:
            yield f"{key}.{name}.weight={source.weight}: expected 0 to 1"
        yield from _source(f"{key}.{name}", source)
        if source.format == "chat" and not config.teacher.chat:
            yield f"{key}.{name}.format=chat: the teacher {config.teacher.name} has no chat template; use format=text"


def _source(key: str, source: Source) -> Iterator[str]:
    if not source.path:
        yield f"{key}.path: empty; give files, a hub id, or what the demo makes (kind=demo)"
    if source.kind == "demo" and source.path not in DEMO_DOCUMENTS:
        yield f"{key}.path={source.path}: expected {', '.join(DEMO_DOCUMENTS)} (kind=demo)"
    if source.limit < 0:
        yield f"{key}.limit={source.limit}: expected 0 (all) or more"
    if source.tokens < -1:
        yield f"{key}.tokens={source.tokens}: expected -1 (what is drawn), 0 (all) or more"
    if not 1 <= source.parts <= MOST_PARTS:
        yield f"{key}.parts={source.parts}: expected 1 to {MOST_PARTS} (each piece reads the whole source)"


def same_source(defined: dict[str, tuple[str, Source]], key: str, name: str, source: Source) -> Iterator[str]:
    """Problems of `key.name`, if it is another source than the one that `defined` has under this name."""
    place, first = defined.setdefault(name, (key, source))
    for field in vars(source):
        if field not in ("weight", "tokens") and getattr(source, field) != getattr(first, field):
            yield (
                f"{key}.{name}.{field}={getattr(source, field)}: {place}.{name} says {getattr(first, field)}; "
                f"two sources need two names"
            )


def _training(stage: str, settings: Training) -> Iterator[str]:
    for key in ("tokens", "batch", "micro_batch", "checkpoint_every", "validation_samples"):
        if getattr(settings, key) < 1:
            yield f"{stage}.{key}={getattr(settings, key)}: expected 1 or more"
    if not 0 < settings.lr < math.inf:
        yield f"{stage}.lr={settings.lr}: expected more than 0"
    if not 0 <= settings.min_lr <= settings.lr:
        yield f"{stage}.min_lr={settings.min_lr}: expected 0 to {stage}.lr={settings.lr}"
    if not 0 <= settings.warmup < 1:
        yield f"{stage}.warmup={settings.warmup}: expected 0 to 1, 1 excluded"
    for key in ("clip", "validate_every"):
        if not getattr(settings, key) >= 0:
            yield f"{stage}.{key}={getattr(settings, key)}: expected 0 or more"


def _optimiser(config: Config) -> Iterator[str]:
    adamw, guard = config.adamw, config.guard
    yield from _at_least(0, adamw__weight_decay=adamw.weight_decay)
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(adamw, key) < 1:
            yield f"adamw.{key}={getattr(adamw, key)}: expected 0 to 1, 1 excluded"
    yield from _at_least(1, guard__keep=guard.keep, guard__skip_limit=guard.skip_limit)
    yield from _at_least(
        0, guard__keep_every=guard.keep_every, guard__stuck_seconds=guard.stuck_seconds,
        guard__spike_sigma=guard.spike_sigma,
    )  # fmt: skip
    if config.strategy.offload and config.strategy.name != "zero3":
        yield f"strategy.offload=true: works with strategy.name=zero3 only, got {config.strategy.name}"
    if config.strategy.compile and config.strategy.name == "zero3":
        yield "strategy.compile=true: zero3 cannot; use strategy.name=fsdp"
    if config.strategy.shard == "node" and config.strategy.name not in ("auto", "fsdp"):
        yield f"strategy.shard=node: works with strategy.name=fsdp only, got {config.strategy.name}"


def _distillation(config: Config) -> Iterator[str]:
    distill, loss, sampler = config.distill, config.loss, config.sampler
    vocabulary = config.teacher.vocab_size
    yield from _at_least(1, cache__top_k=config.cache.top_k, cache__chunk=config.cache.chunk)
    yield from _at_least(1, cache__micro_batch=config.cache.micro_batch)
    yield from _at_least(0, cache__max_samples=config.cache.max_samples, distill__mixer_lr=distill.mixer_lr)
    if vocabulary and config.cache.top_k > vocabulary:
        yield f"cache.top_k={config.cache.top_k}: above the teacher's vocabulary; expected 1 to {vocabulary}"
    if not (distill.gamma >= 0 and distill.beta >= 0 and 0 < distill.gamma + distill.beta < math.inf):
        yield f"distill.gamma={distill.gamma}, distill.beta={distill.beta}: expected 0 or more, and not both 0"
    if loss == "full" and distill.targets != "online":
        yield "distill.loss=full: needs the whole distribution of the teacher; add distill.targets=online"
    if loss == "random" and distill.targets == "online":
        yield "distill.loss=random: nothing is sampled from an online teacher; use distill.loss=full"
    if distill.targets == "cached" and sampler not in (reads := SAMPLERS.get(loss, (sampler,))):
        yield f"distill.loss={loss}: reads targets of cache.sampler={' or '.join(reads)}, got {sampler}"
    if sampler == "hybrid" and config.cache.top_k < 2:
        yield f"cache.top_k={config.cache.top_k}: half of hybrid is drawn; expected 2 or more"
    if loss == "random" and distill.divergence != "forward":
        yield f"distill.divergence={distill.divergence}: sampled targets estimate the forward KL only; use forward"
    if not 0 < distill.temperature < math.inf:
        yield f"distill.temperature={distill.temperature}: expected more than 0"
    elif distill.temperature != 1 and distill.targets == "cached" and loss != "topk":
        yield (
            f"distill.temperature={distill.temperature}: the mass that cached targets leave out is known at 1 only; "
            "use distill.temperature=1, distill.loss=topk, or distill.targets=online"
        )
    if config.stage == "cache" and distill.targets == "online":
        yield "stage=cache: there is nothing to cache with distill.targets=online; use distill.targets=cached"
    if config.stage == "tokenize" and config.data.shards:
        yield f"stage=tokenize: data.shards={config.data.shards} takes its place; leave one of them out"
    if config.stage == "align" and config.student.init_from:
        yield f"stage=align: student.init_from={config.student.init_from} takes its place; leave one of them out"


def _distil_xlstm(config: Config) -> Iterator[str]:
    distill, known = config.distill, "student=distil_xlstm"
    yield from _at_least(0, distill__beta_end=distill.beta_end, distill__hidden=distill.hidden)
    if not 0 < distill.temperature_end < math.inf:
        yield f"distill.temperature_end={distill.temperature_end}: expected more than 0"
    if config.student.kind != "distil_xlstm":
        return
    if distill.targets != "online":
        yield (
            f"distill.targets={distill.targets}: {known} learns from the teacher's hidden states at a falling "
            "temperature, which no cache holds; use distill.targets=online"
        )
    if config.loss != "full" or distill.divergence != "forward":
        yield (
            f"distill.loss={distill.loss}, distill.divergence={distill.divergence}: {known} has the forward KL over "
            "the vocabulary; use distill.loss=full distill.divergence=forward"
        )
    if distill.beta_end > distill.gamma + distill.beta:
        yield f"distill.beta_end={distill.beta_end}: expected at most gamma + beta, of which gamma gets the rest"
    if config.student.reset_at_documents:
        yield f"student.reset_at_documents=true: {known} reads on across documents; leave it out"
    if config.strategy.compile:
        yield f"strategy.compile=true: {known} has a loop over positions, which it would unroll; leave it out"


def _places(config: Config) -> Iterator[str]:
    for stage, placement in config.cluster.stages.items():
        key = f"cluster.stages.{stage}"
        if stage not in STAGES:
            nearest = get_close_matches(stage, STAGES, n=1, cutoff=0.0)[0]
            yield f"{key}: no such stage; the nearest is {nearest}"
        for name in ("nodes", "cpus_per_task", "segments"):
            if getattr(placement, name) < 1:
                yield f"{key}.{name}={getattr(placement, name)}: expected 1 or more"
        for name in ("memory", "partition"):
            if not getattr(placement, name).isprintable():
                yield f"{key}.{name}={getattr(placement, name)!r}: not fit for sbatch"
        if placement.gpus_per_node < 0:
            yield f"{key}.gpus_per_node={placement.gpus_per_node}: expected 0 or more"
        if not seconds(placement.time):
            yield f"{key}.time={placement.time}: expected Slurm's notation (04:00:00, 1-12:00:00 or minutes)"
        ranks = ranks_of(placement)
        if config.strategy.name == "single" and stage in TRAINING and ranks > 1:
            yield f"strategy.name=single: {stage} has {ranks} ranks; use strategy=fsdp or one node with one GPU"
        if config.strategy.name == "single" and stage == "cache" and ranks > 1:
            yield f"strategy.name=single: cache has {ranks} ranks; use strategy=fsdp, or one GPU and parts of sources"
        if stage not in (*TRAINING, "cache", "eval") and ranks > 1:
            yield f"{key}: {stage} runs as one rank; got {placement.nodes} nodes × {placement.gpus_per_node} GPUs"
    yield from _at_least(0, strategy__threads=config.strategy.threads)
    yield from _between(0, 65535, cluster__signal_seconds=config.cluster.signal_seconds)
    yield from _site(config)


def _site(config: Config) -> Iterator[str]:
    cluster = config.cluster
    for flag, value in cluster.sbatch.items():
        key = f"cluster.sbatch.{flag}"
        if not re.fullmatch(r"[a-z][a-z0-9-]+", flag):
            yield f"{key}: expected the long name of an option of sbatch (account, qos, exclude)"
        elif flag in OURS:
            yield f"{key}={value}: {OURS[flag]}"
        elif not value.isprintable():
            yield f"{key}={value!r}: not fit for sbatch"
    for key in ("image", "scratch"):
        if not getattr(cluster, key).isprintable():
            yield f"cluster.{key}={getattr(cluster, key)!r}: a line break or another control character is in it"
    if (cluster.container == "none") != (not cluster.image):
        yield f"cluster.image={cluster.image or '(empty)'}: goes with cluster.container={cluster.container} " + (
            "only when it names an image" if not cluster.image else "not at all; set pyxis or apptainer"
        )
    if cluster.scratch and not cluster.scratch.startswith("/"):
        yield f"cluster.scratch={cluster.scratch}: expected an absolute folder"
    if find_device(cluster.gpu) is None:
        known = ", ".join(device.name.replace(" ", "-") for device in DEVICES)
        yield f"cluster.gpu={cluster.gpu}: not known; name what is nearest of {known}, with its GB (h100-96)"
    for line in cluster.setup:
        if "\0" in line:
            yield f"cluster.setup: {line!r} holds a NUL"


def _evaluation(config: Config) -> Iterator[str]:
    yield from _at_least(0, eval__limit=config.eval.limit)
    yield from _at_least(1, eval__samples=config.eval.samples, eval__batch=config.eval.batch)
    yield from _tasks(config)
    known = ("teacher", "window", "aligned", "merged", *config.experts)
    for name in config.eval.models:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            yield f"eval.models={name}: no such model; the nearest is {nearest} (all: {', '.join(known)})"


def _tasks(config: Config) -> Iterator[str]:
    longest = config.teacher.max_position_embeddings or math.inf
    for length in config.eval.lengths:
        yield from _between(SHORTEST, longest, ", the teacher's positions", eval__lengths=length)
    for key in ("shots", "max_new_tokens"):
        for task, value in getattr(config.eval, key).items():
            if value < (1 if key == "max_new_tokens" else 0):
                yield f"eval.{key}.{task}={value}: expected {1 if key == 'max_new_tokens' else 0} or more"
    if config.eval.chat and not config.teacher.chat:
        yield f"eval.chat=true: the teacher {config.teacher.name} has no chat template"
    if not set(config.experts) <= set(config.expert):
        return
    sources, lengths = tuple(config.sources), lengths_of(config)
    yield from _unknown_local("eval.tasks", expand(config.eval.tasks, sources, lengths), local_names(sources, lengths))


def _unknown_local(key: str, tasks: Iterable[str], known: list[str]) -> Iterator[str]:
    for task in tasks:
        if task.startswith(PREFIX) and task not in known:
            nearest = get_close_matches(task, known, n=1, cutoff=0.0)[0]
            yield f"{key}={task}: no such local task; the nearest is {nearest} (all: {', '.join(known)})"


def _merging(config: Config) -> Iterator[str]:
    merge, layers = config.merge, config.teacher.num_hidden_layers
    merged = [name for name in config.experts if name in config.expert and not config.expert[name].union_of]
    for expert, parts in merge.weights.items():
        if expert not in merged:
            nearest = get_close_matches(expert, merged, n=1, cutoff=0.0)
            hint = f"the nearest is {nearest[0]} (all: {', '.join(merged)})" if nearest else "none is"
            yield f"merge.weights.{expert}: no such expert is merged; {hint}"
        if problem := problem_of(parts, layers):
            yield f"merge.weights.{expert}.{problem}"
    yield from _between(0, 1, merge__density=merge.density)
    yield from _at_least(0, merge__search=merge.search)
    if merge.search and merged:
        yield from _search(merge, len(merged))
    gone = [part for part in {p for parts in merge.weights.values() for p in parts} if _all_zero(config, merged, part)]
    if gone:
        yield f"merge.weights: {gone[0]} is 0 for every expert; give one of them a weight"
    for key in ("density", "scale"):
        if not 0 < getattr(merge, key) < math.inf:
            yield f"merge.{key}={getattr(merge, key)}: expected more than 0"
    methods = get_args(get_type_hints(Merge)["method"])
    for name in merge.methods:
        if name not in methods:
            yield f"merge.methods={name}: not one of {', '.join(methods)}"
    if "slerp" in merge.tried and merged and len(merged) != 2:
        key = "methods" if merge.search and merge.methods else "method"
        yield f"merge.{key}=slerp: turns one expert to another; expected 2 experts, got {len(merged)}"
    if merge.search and merge.weights:
        yield "merge.weights: merge.search finds the weights; leave one of them out"
    if merged and set(config.experts) <= set(config.expert):
        sources, lengths = tuple(config.sources), lengths_of(config)
        known = [name for name in local_names(sources, lengths) if not name.startswith(f"{PREFIX}positions_")]
        yield from _unknown_local("merge.tasks", expand(merge.tasks, sources, lengths), known)
    for key in ("methods", "tasks"):
        if getattr(merge, key) and not merge.search:
            yield f"merge.{key}: belong to a search; add merge.search=4, or give merge.{key}=[]"


def _search(merge: Merge, experts: int) -> Iterator[str]:
    if experts < 2:
        yield f"merge.search={merge.search}: there is one expert to merge; expected two or more, or merge.search=0"
    elif (count := math.comb(merge.search + experts - 1, experts - 1) * len(merge.tried)) > MOST_CANDIDATES:
        yield f"merge.search={merge.search}: {count} candidates; expected at most {MOST_CANDIDATES}, so a smaller one"


def _all_zero(config: Config, merged: Collection[str], part: str) -> bool:
    found = [config.merge.weights.get(name, {}).get(part, config.expert[name].merge_weight) for name in merged]
    return bool(found) and not any(found)


def ranks_of(placement: Placement) -> int:
    """Processes of a job: one per GPU, or one."""
    return max(1, placement.nodes) * max(1, placement.gpus_per_node)


def seconds(time: str) -> int:
    """Seconds of a limit in Slurm's notation (`90`, `4:00`, `04:00:00`, `1-12`, `1-12:00:00`); 0 where it is none."""
    days, dash, rest = time.partition("-") if "-" in time else ("0", "", time)
    parts = rest.split(":")
    if len(parts) > 3 or not all(part.isascii() and part.isdigit() for part in (days, *parts)):
        return 0
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, secs = numbers + [0] * (3 - len(numbers))
    else:
        hours, minutes, secs = {1: (0, numbers[0], 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]  # type: ignore[misc]
    return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
