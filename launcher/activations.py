"""What a layer and the loss keep for the backward pass and work with, in bytes of one rank (pure).

n: positions of a micro-batch, V: vocabulary, H: width, e: bytes of a number in the products. Read with
`model/mixer.py`, `model/mlstm.py` and `objectives/distill.py` beside it; `benchmarks/plan.py` compares with what torch
allocates.
"""

from dataclasses import dataclass

from launcher.parameters import Counts, count
from xlstm_distill.contract.schema import Config

FLOAT32 = 4
LOSS_ROWS = 256
"""Positions whose logits Stage II computes at one time (`objectives.distill`)."""
SEGMENT = 1 << 18
"""Elements of a [L, L] product that the torch form of the cell holds at once on a CPU (`model.mlstm`)."""
CELL = 9
"""Tensors of a segment in its backward pass: D, Q Kᵀ and the gradients of both products of them, reading, adding, the
gradients of both, and of the states."""


@dataclass(frozen=True)
class Setting:
    """What the formulas need of a configuration, for one stage on so many ranks."""

    config: Config
    counts: Counts
    stage: str
    ranks: int
    shards: int
    """S."""
    on_gpu: bool

    @property
    def sharded(self) -> bool:
        return self.name != "single"

    @property
    def name(self) -> str:
        """Of the strategy that `auto` means."""
        chosen = self.config.strategy.name
        return chosen if chosen != "auto" else ("fsdp" if self.ranks > 1 else "single")

    @property
    def product(self) -> int:
        """e."""
        return 2 if self.config.strategy.precision == "bfloat16" else FLOAT32

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream: autocast leaves it in float32, sharding casts everything."""
        return self.product if self.sharded else FLOAT32

    @property
    def cast(self) -> bool:
        """Whether autocast casts whole parameters to bfloat16."""
        return not self.sharded and self.product < FLOAT32

    @property
    def offloaded(self) -> bool:
        """Whether parameters, gradients and moments of Stage II wait in another memory than the device's."""
        return self.config.strategy.offload and self.name == "zero3" and self.on_gpu

    @property
    def triton(self) -> bool:
        student, kernel = self.config.student, self.config.model.kernel
        return student.feature_rope != "after" and (kernel == "triton" or (kernel == "auto" and self.on_gpu))

    @property
    def micro(self) -> int:
        """Sequences of a forward on one rank."""
        training = getattr(self.config, self.stage)
        return int(min(training.micro_batch, -(-training.batch // self.ranks)))

    @property
    def positions(self) -> int:
        """n."""
        return self.micro * self.config.data.sequence

    @property
    def accumulates(self) -> bool:
        """Whether gradients of an earlier micro-batch lie there during the next."""
        training = getattr(self.config, self.stage)
        return -(-training.batch // self.ranks) > self.micro


def setting_of(config: Config, stage: str, nodes: int, gpus_per_node: int) -> Setting:
    """The setting of a stage's job on `nodes` with `gpus_per_node` ranks each (0: one rank on the CPU)."""
    per_node = max(1, gpus_per_node)
    ranks = nodes * per_node
    setting = Setting(config, count(config.teacher, config.student), stage, ranks, 1, gpus_per_node > 0)
    shards = (per_node if config.strategy.shard == "node" else ranks) if setting.sharded else 1
    return Setting(config, setting.counts, stage, ranks, shards, setting.on_gpu)


def loss_kept(s: Setting) -> float:
    """From the loss to the backward pass: the gradients of the head, in float32, and of the last hidden states."""
    t = s.config.teacher
    return float(FLOAT32 * t.vocab_size * t.hidden_size + s.stream * s.positions * t.hidden_size)


def loss_chunk(s: Setting) -> float:
    """While a chunk of R positions is computed: its logits [R, V] in float32, which become their gradient, and with
    `loss=full` the teacher's. With bfloat16 products also the head and the teacher's cast, what the product with the
    head gave beside the gradient of the chunk before, or the gradient cast beside the chunk's share of the head's."""
    t, e = s.config.teacher, s.product
    rows, head = min(LOSS_ROWS, s.positions) * t.vocab_size, t.vocab_size * t.hidden_size
    buffers = 2 if s.config.loss == "full" else 1
    casts = e * head * buffers if s.cast else 0
    before = e * rows if s.positions > LOSS_ROWS else 0
    products = max(before + e * rows, e * rows + e * head) if e < FLOAT32 else 0
    return float(buffers * FLOAT32 * rows + casts + products)


def layer_activations(s: Setting) -> float:
    """What autograd keeps of one layer."""
    t, n, e = s.config.teacher, s.positions, s.product
    norms = 2 * (FLOAT32 + s.stream) * t.hidden_size  # x in float32 and x / rms, of both
    # A product keeps its input; autocast casts it for each: q, k, v, gates i and f; gate and up of the MLP.
    inputs = (3 + 2 * s.config.student.use_gates + 2) if s.cast else 2
    output = e * t.num_attention_heads * t.head_dim  # o_proj's input
    return n * (norms + inputs * e * t.hidden_size + output) + mixer_activations(s) + _mlp_activations(s)


def _mlp_activations(s: Setting) -> float:
    """Before and after SiLU, the other factor, and their product."""
    return 4.0 * s.product * s.positions * s.config.teacher.intermediate_size


def mixer_activations(s: Setting) -> float:
    """What autograd keeps of one mixer without its projections. Read with `model/mixer.py` beside it."""
    t, student, e = s.config.teacher, s.config.student, s.product
    heads, groups = t.num_attention_heads, t.num_attention_heads // t.num_key_value_heads
    width, narrow = heads * t.head_dim, t.num_key_value_heads * t.head_dim
    features = width * (2 if student.feature_map == "hedgehog" else 1)
    # Feature maps: input of the product with W, and φ; hedgehog also both softmaxes.
    maps = 2 * (e * width + FLOAT32 * features * (2 if student.feature_map == "hedgehog" else 1))
    maps += 2 * FLOAT32 * features if student.feature_rope == "after" else 0  # φ turned and not
    value = e * width if s.triton else FLOAT32 * width  # the torch form reads float32
    if not s.triton and e == FLOAT32 and groups == 1 and student.use_window:
        value = 0  # it is the window's
    states = 0.0 if s.triton else FLOAT32 * features * (t.head_dim + 1) / student.chunk
    small = 48 * heads  # gates, their sums in float64, denominators, log-sum-exp: counted
    mixed = FLOAT32 * width
    window = gate = 0.0
    if student.use_window:
        # q, k, v (Stage I: needs none), output, and that in float32
        window = (1 if s.stage == "align" else 4) * e * width + (FLOAT32 * width if e < FLOAT32 else 0)
        gate = e * (width + 2 * narrow) if student.gate_input != "hidden" else 0
    return s.positions * (maps + value + states + small + mixed + window + gate)


def layer_work(s: Setting) -> float:
    """What a layer's backward pass holds besides what was kept: gradients of the stream, and then those of the MLP's
    insides, one of which is done with, or, when all that the MLP has kept is gone, of the mixer's."""
    t = s.config.teacher
    mlp = 2 * s.product * s.positions * t.intermediate_size
    return 2 * s.stream * s.positions * t.hidden_size + max(mlp, mixer_work(s) - _mlp_activations(s))


def mixer_work(s: Setting) -> float:
    """In the cell's backward pass: gradients of its numerator, of φ(q), φ(k), v, and (Stage II) of the window's output;
    and the insides of the kernel."""
    t, student = s.config.teacher, s.config.student
    heads, dim, chunk = t.num_attention_heads, t.head_dim, student.chunk
    features = dim * (2 if student.feature_map == "hedgehog" else 1)
    branches = 2 if student.use_window and s.stage == "distill" else 1
    outside = FLOAT32 * s.positions * heads * ((branches + 1) * dim + 2 * features)
    if s.triton:  # states and their gradients once more, and the gradient of the numerator as an operand
        inside = s.positions * heads * (2 * FLOAT32 * features * (dim + 1) / chunk + s.product * dim)
    else:  # on a CPU one segment at a time
        rows = s.positions * heads if s.on_gpu else min(s.positions * heads, SEGMENT / chunk)
        inside = CELL * FLOAT32 * rows * max(features, dim, chunk, features * dim / chunk)
    return float(outside + inside)


def stage_i_stream(s: Setting) -> float:
    """What the frozen model holds in a layer: stream, normed; q, k, v before and after RoPE; h; errors in float32."""
    t, e = s.config.teacher, s.product
    width, narrow = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    gates = FLOAT32 * t.hidden_size if s.sharded and e < FLOAT32 else 0  # normed, for gates that stay in float32
    stream = 2 * s.stream * t.hidden_size + gates
    return float(s.positions * (stream + e * (2 * width + 3 * narrow) + e * width + FLOAT32 * width))


def document_masks(s: Setting) -> float:
    """With documents apart the teacher's attention gets a mask: distances int64, and what is compared."""
    if not s.config.student.reset_at_documents:
        return 0.0
    return float(s.positions * s.config.data.sequence * (8 + 3 + s.product))
