"""What the schema's types cannot say: values that cannot work, each with the key, the value and the range (pure)."""

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import get_args, get_type_hints

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Config, Placement, Source, Training
from xlstm_distill.contract.state import TRAINING
from xlstm_distill.contract.tasks import PREFIX, local_names

STAGES = tuple(stage for stage in get_args(get_type_hints(Config)["stage"]) if stage != "pipeline")
"""Names of the stages, in the order of the pipeline."""
LONGEST_NAME = 100


def check(config: Config) -> None:
    """Raise for the first thing in `config` that cannot work, wherever it runs.

    Raises:
        Mistake: one line.
    """
    for problem in problems(config):
        raise Mistake(problem)


def misplaced(config: Config) -> Iterator[str]:
    """One line per training job whose batch cannot be shared by its ranks (a dry run tells, a launch refuses)."""
    for stage in TRAINING:
        settings, ranks = getattr(config, stage), ranks_of(config.cluster.stages.get(stage, Placement()))
        if settings.batch < ranks:
            yield f"{stage}.batch={settings.batch}: {ranks} ranks need a sample each; expected {ranks} or more"


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
    yield from _distillation(config)
    yield from _places(config)
    yield from _evaluation(config)


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
    weights = [config.expert[name].merge_weight for name in config.experts if name in config.expert]
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
    yield from _at_least(0, data__workers=data.workers)
    yield from _at_least(1 << 16, data__shard_bytes=data.shard_bytes)
    if not data.sources:
        yield "data.sources: empty; name at least one source"
    mixtures = {"data.sources": data.sources}
    mixtures |= {
        f"expert.{name}.sources": config.expert[name].sources for name in config.experts if name in config.expert
    }
    defined: dict[str, tuple[str, Source]] = {}
    for key, mixture in mixtures.items():
        yield from _mixture(config, key, mixture)
        for name, source in mixture.items():
            yield from _same_source(defined, key, name, source)


def _mixture(config: Config, key: str, mixture: Mapping[str, Source]) -> Iterator[str]:
    total = math.fsum(source.weight for source in mixture.values())
    if mixture and not abs(total - 1) <= 1e-6:
        yield f"{key}.*.weight: the weights sum to {total:.6g}; they have to sum to 1"
    for name, source in mixture.items():
        if not source.weight >= 0:
            yield f"{key}.{name}.weight={source.weight}: expected 0 to 1"
        if not source.path:
            yield f"{key}.{name}.path: empty; give files, a hub id, or math or code (kind=demo)"
        if source.kind == "demo" and source.path not in ("math", "code"):
            yield f"{key}.{name}.path={source.path}: expected math or code (kind=demo)"
        if source.limit < 0:
            yield f"{key}.{name}.limit={source.limit}: expected 0 (all) or more"
        if source.format == "chat" and not config.teacher.chat:
            yield f"{key}.{name}.format=chat: the teacher {config.teacher.name} has no chat template; use format=text"


def _same_source(defined: dict[str, tuple[str, Source]], key: str, name: str, source: Source) -> Iterator[str]:
    place, first = defined.setdefault(name, (key, source))
    for field in vars(source):
        if field != "weight" and getattr(source, field) != getattr(first, field):
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
    distill, vocabulary = config.distill, config.teacher.vocab_size
    yield from _at_least(1, cache__top_k=config.cache.top_k, cache__chunk=config.cache.chunk)
    yield from _at_least(1, cache__micro_batch=config.cache.micro_batch)
    yield from _at_least(0, cache__max_samples=config.cache.max_samples, distill__mixer_lr=distill.mixer_lr)
    if vocabulary and config.cache.top_k > vocabulary:
        yield f"cache.top_k={config.cache.top_k}: above the teacher's vocabulary; expected 1 to {vocabulary}"
    if not (distill.gamma >= 0 and distill.beta >= 0 and 0 < distill.gamma + distill.beta < math.inf):
        yield f"distill.gamma={distill.gamma}, distill.beta={distill.beta}: expected 0 or more, and not both 0"
    if distill.loss == "full" and distill.targets != "online":
        yield "distill.loss=full: needs the whole distribution of the teacher; add distill.targets=online"
    if config.stage == "cache" and distill.targets == "online":
        yield "stage=cache: there is nothing to cache with distill.targets=online; use distill.targets=cached"
    if config.stage == "tokenize" and config.data.shards:
        yield f"stage=tokenize: data.shards={config.data.shards} takes its place; leave one of them out"
    if config.stage == "align" and config.student.init_from:
        yield f"stage=align: student.init_from={config.student.init_from} takes its place; leave one of them out"


def _places(config: Config) -> Iterator[str]:
    for stage, placement in config.cluster.stages.items():
        key = f"cluster.stages.{stage}"
        if stage not in STAGES:
            nearest = get_close_matches(stage, STAGES, n=1, cutoff=0.0)[0]
            yield f"{key}: no such stage; the nearest is {nearest}"
        for name in ("nodes", "cpus_per_task", "segments"):
            if getattr(placement, name) < 1:
                yield f"{key}.{name}={getattr(placement, name)}: expected 1 or more"
        if placement.gpus_per_node < 0:
            yield f"{key}.gpus_per_node={placement.gpus_per_node}: expected 0 or more"
        if not seconds(placement.time):
            yield f"{key}.time={placement.time}: expected Slurm's notation (04:00:00, 1-12:00:00 or minutes)"
        ranks = ranks_of(placement)
        if config.strategy.name == "single" and stage in TRAINING and ranks > 1:
            yield f"strategy.name=single: {stage} has {ranks} ranks; use strategy=fsdp or one node with one GPU"
        if stage not in TRAINING and ranks > 1:
            yield f"{key}: {stage} runs as one rank; got {placement.nodes} nodes × {placement.gpus_per_node} GPUs"
    yield from _at_least(0, strategy__threads=config.strategy.threads)
    yield from _between(0, 65535, cluster__signal_seconds=config.cluster.signal_seconds)
    for key in ("account", "partition", "qos", "constraint"):
        value = getattr(config.cluster, key)
        if value and (not value.isprintable() or value.startswith("-")):
            yield f"cluster.{key}={value!r}: not fit for sbatch"
    for line in config.cluster.setup:
        if "\0" in line:
            yield f"cluster.setup: {line!r} holds a NUL"


def _evaluation(config: Config) -> Iterator[str]:
    yield from _at_least(0, eval__limit=config.eval.limit)
    yield from _at_least(1, eval__samples=config.eval.samples, eval__batch=config.eval.batch)
    local = local_names(config.sources) if set(config.experts) <= set(config.expert) else []
    for task in config.eval.tasks:
        if local and task.startswith(PREFIX) and task not in local:
            nearest = get_close_matches(task, local, n=1, cutoff=0.0)[0]
            yield f"eval.tasks={task}: no such local task; the nearest is {nearest} (all: {', '.join(local)})"
    known = ("teacher", "window", "aligned", "merged", *config.experts)
    for name in config.eval.models:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            yield f"eval.models={name}: no such model; the nearest is {nearest} (all: {', '.join(known)})"


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
