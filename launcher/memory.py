"""Bytes that one rank holds in a training step or in a teacher's forward, part by part: formulas of the configuration.

A step has moments at which memory is highest; each is a `Memory`, and the largest is what a rank needs. Written out in
docs/planning.md; `benchmarks/plan.py` compares with what torch allocates. n: positions of a micro-batch, V: vocabulary,
H: width, e: bytes of a number in the products, S: ranks that share a parameter.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from launcher.activations import (
    FLOAT32,
    Setting,
    document_masks,
    layer_activations,
    layer_work,
    loss_chunk,
    loss_kept,
    mixer_activations,
    mixer_work,
    setting_of,
    stage_i_stream,
)
from xlstm_distill.contract.schema import Config

STATE = 3 * FLOAT32
"""Bytes of a parameter that trains and its two moments."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: so many it leaves gathered."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at one moment."""

    weights: float = 0.0
    """Parameters that stay: sharded, or whole."""
    gathered: float = 0.0
    """Copies of parameters while they are needed: all-gathered, or cast."""
    gradients: float = 0.0
    """With the buffers of their reduction."""
    optimizer: float = 0.0
    """AdamW's moments."""
    activations: float = 0.0
    """Kept for the backward pass, and what a layer works with."""
    logits: float = 0.0
    """Of a chunk of positions with the gradient of the head, which is taken with them."""
    targets: float = 0.0
    """Of the teacher, as they come from the cache."""
    teacher: float = 0.0
    """The online teacher's parameters. Its forward comes before the student's: what it works with is never the most."""
    copies: float = 0.0
    """Of the training state in host memory, for checkpoints; counted where that is the device's own."""

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(vars(self).values()))


PARTS = tuple(field.name for field in fields(Memory))


def peak(config: Config, stage: str, nodes: int, gpus_per_node: int) -> Memory:
    """The highest moment of a job of `align`, `distill` or `cache`; other stages hold no model that counts."""
    setting = setting_of(config, stage, nodes, gpus_per_node)
    return max(moments(setting).values(), key=lambda memory: memory.total)


def moments(setting: Setting) -> dict[str, Memory]:
    """The moments of a step by name."""
    found = {"align": _align, "distill": _distill, "cache": _cache}[setting.stage](setting)
    return dict(found)


def _distill(s: Setting) -> Iterator[tuple[str, Memory]]:
    """Stage II. Everything trains: float32 parameters, gradients and two moments, divided by S."""
    c, t, n, e = s.counts, s.config.teacher, s.positions, s.product
    head, steady, state = t.vocab_size * t.hidden_size, _steady(s), _gradients(s)
    earlier = state if s.accumulates else 0.0
    recomputed = s.config.strategy.activation_checkpointing
    kept, layer, work = kept_activations(s), layer_activations(s), layer_work(s)

    def at(gathered: float, gradients: float, activations: float, logits: float) -> Memory:
        return Memory(gathered=gathered, gradients=gradients, activations=activations, logits=logits, **steady)

    yield "loss", at(_gathered_by_loss(s), earlier, kept, loss_kept(s) + loss_chunk(s))
    # The backward pass begins: the head's gradient, and again in the parameters' dtype.
    product = FLOAT32 * head + (e * head if s.sharded and e < FLOAT32 else 0)
    root, arriving = _gathered_root(s), e * c.layer if s.sharded else 0.0
    yield "head", at(root + arriving, earlier, kept, product + 2 * s.stream * n * t.hidden_size)
    # The last layer's backward pass: it and the next are gathered, the reduction of another is under way, and the
    # head's gradient waits for the end. Recomputed, a layer's activations come on top of what is kept.
    reduction = (FLOAT32 + e) * c.layer + e * head if s.sharded else 0.0
    heads = FLOAT32 * head if not s.sharded and not s.accumulates else 0.0
    cast = _cast_layer(s) if recomputed else 0.0
    again = layer if recomputed else 0.0
    yield "last layer", at(root + 2 * arriving + cast, earlier + heads + reduction, kept + again + work, 0)
    # The first layer's: nearly all gradients are there, and no other layer's activations.
    gathered = (root if s.sharded else _cast_layer(s)) + 2 * arriving
    yield "first layer", at(gathered, state + reduction, s.stream * n * t.hidden_size + layer + work, 0)
    # The end: what no layer owns is reduced at once, or the embedding's gradient joins the head's.
    owned_by_none = (FLOAT32 * (1 + 1 / s.shards) + e) * c.root if s.sharded else FLOAT32 * head * s.accumulates
    yield "root", at(0.0, state + owned_by_none, s.stream * n * t.hidden_size, 0)
    yield "update", at(0.0, state, 0, 0)


def _gradients(s: Setting) -> float:
    """All gradients of Stage II on one rank; offloaded they are in host memory."""
    c = s.counts
    return 0.0 if s.offloaded else FLOAT32 * (c.total - c.layers * c.idle) / s.shards


def _steady(s: Setting) -> dict[str, float]:
    """What Stage II holds all the time, by part."""
    c = s.counts
    trained = (c.total - c.layers * c.idle) / s.shards
    # ZeRO-3 keeps a master in float32 beside the parameters in bfloat16.
    size = FLOAT32 + (s.product if s.name == "zero3" and s.product < FLOAT32 else 0)
    return {
        "weights": 0.0 if s.offloaded else size * c.total / s.shards,
        "optimizer": 0.0 if s.offloaded else 2 * FLOAT32 * trained,
        "targets": _targets(s),
        "teacher": _teacher_weights(s),
        "copies": 0.0 if s.on_gpu else STATE * trained,
    }


def _align(s: Setting) -> Iterator[tuple[str, Memory]]:
    """Stage I. The frozen model is divided by S; the mixers, their gradients and moments are whole, in float32."""
    c, t, n = s.counts, s.config.teacher, s.positions
    new, trained = c.layers * c.new, c.layers * (c.new - c.idle)
    steady = {
        "weights": FLOAT32 * (c.total - new) / s.shards + FLOAT32 * new,
        "optimizer": 2 * FLOAT32 * trained,
        "copies": 0.0 if s.on_gpu else STATE * trained,
    }
    old = FLOAT32 * (c.layer - c.new)
    # No backward pass ends here, so what belongs to no layer stays gathered; then a layer, and the next as it arrives.
    gathered = _gathered_root(s) + (2 * s.product / FLOAT32 * old if s.sharded else 0.0)
    mixing = stage_i_stream(s) + mixer_activations(s) + mixer_work(s) + document_masks(s)
    # Autocast keeps no copy of what is frozen: a matrix is cast while it multiplies.
    cast = s.product * t.hidden_size if s.cast else 0
    mlp = 2 * s.stream * n * t.hidden_size + (3 * s.product * n + cast) * t.intermediate_size
    yield "layer", Memory(gathered=gathered, gradients=FLOAT32 * trained, activations=max(mixing, mlp), **steady)
    # The gradients, all of them in one flat tensor, and divided by the norms.
    reduction = 3 * FLOAT32 * trained
    yield "update", Memory(gathered=_gathered_root(s), gradients=reduction, **steady)


def _cache(s: Setting) -> Iterator[tuple[str, Memory]]:
    """The teacher alone: bfloat16 on a GPU, float32 on a CPU; over several ranks sharded as beside a student."""
    c, t, cache = s.counts, s.config.teacher, s.config.cache
    size = s.product if s.on_gpu else FLOAT32
    teacher = c.total - c.layers * c.new
    weights = FLOAT32 * teacher / s.shards if s.ranks > 1 else size * teacher
    gathered = size * (c.root + 2 * (c.layer - c.new)) if s.ranks > 1 else 0.0
    n = cache.micro_batch * s.config.data.sequence
    layer = size * n * (4 * t.hidden_size + 3 * t.intermediate_size)
    # Logits of the products in float32, and logsumexp's own copy.
    logits = min(cache.chunk, n) * t.vocab_size * (size + 2 * FLOAT32)
    found = n * cache.top_k * (8 + FLOAT32)
    yield "layer", Memory(weights=weights, gathered=gathered, activations=layer)
    stream = size * n * t.hidden_size
    yield "logits", Memory(weights=weights, gathered=gathered, activations=stream, logits=logits, targets=found)


def _targets(s: Setting) -> float:
    """ids int64, log-probabilities and tail float32; on a CPU those of the rank's whole share of the batch."""
    k, training = s.config.cache.top_k, s.config.distill
    if s.config.loss == "full":
        t = s.config.teacher
        return float(s.product * (s.positions * t.hidden_size + t.vocab_size * t.hidden_size * (s.ranks > 1)))
    samples = s.micro if s.on_gpu or training.targets == "online" else -(-training.batch // s.ranks)
    return float(samples * s.config.data.sequence * (k * (8 + FLOAT32) + FLOAT32))


def _teacher_weights(s: Setting) -> float:
    """Beside the student, online: divided by S, and what belongs to no layer gathered, from its first forward on."""
    if s.config.distill.targets != "online":
        return 0.0
    c = s.counts
    return FLOAT32 * (c.total - c.layers * c.new) / s.shards + (s.product * c.root if s.sharded else 0)


def _gathered_root(s: Setting) -> float:
    """Embedding, head and last norm, gathered from the forward to the end of the backward pass."""
    if not s.sharded:  # what autocast has cast is kept with the activations, unless they are computed again
        kept = s.cast and s.stage == "distill" and not s.config.strategy.activation_checkpointing
        return float(kept * s.product * s.counts.layers * s.counts.linear)
    extra = min(s.counts.total - s.counts.root, LIVE_PARAMETERS) if s.name == "zero3" else 0
    return float(s.product * (s.counts.root + extra))


def _gathered_by_loss(s: Setting) -> float:
    """At the end of the forward pass: the last layer's all-gather has not been given back; autocast keeps every
    parameter that it has cast until its context ends."""
    c = s.counts
    if s.cast:
        return float(s.product * c.layers * c.linear)
    return _gathered_root(s) + (s.product * c.layer if s.sharded else 0)


def _cast_layer(s: Setting) -> float:
    return float(s.product * s.counts.linear) if s.cast else 0.0


def kept_activations(s: Setting) -> float:
    """From the forward to the backward pass: of every layer its own, or with recomputation its input alone."""
    t, n = s.config.teacher, s.positions
    checkpointing = s.config.strategy.activation_checkpointing
    layer = s.stream * n * t.hidden_size if checkpointing else layer_activations(s)
    last = n * t.hidden_size * (FLOAT32 + 2 * s.stream)  # final norm: its input in float32, normed, and what it gives
    return t.num_hidden_layers * layer + last
