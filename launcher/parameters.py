"""How many parameters a student has, from the teacher's shape (pure)."""

from dataclasses import dataclass

from xlstm_distill.contract.distil_xlstm import Blocks
from xlstm_distill.contract.schema import Student, Teacher


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""

    layers: int
    """Decoder layers."""
    layer: int
    """Of one of them, everything."""
    new: int
    """Of one of them, those that the teacher does not have."""
    idle: int
    """Of the new ones those that compute nothing, because a branch or the gates are off."""
    linear: int
    """Of one of them, matrices: what autocast casts."""
    root: int
    """Embedding, head and last norm."""

    @property
    def total(self) -> int:
        """Of the student; tied matrices once."""
        return self.root + self.layers * self.layer

    @property
    def teacher(self) -> int:
        """Of the teacher."""
        return self.total - self.layers * self.new


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of any student, and of its teacher."""

    total: int
    """Of the student; tied matrices once."""
    new: int
    """Of these, those that the teacher does not have."""
    teacher: int
    aligned: int
    """Those that Stage I trains."""
    trained: int
    """Those that Stage II trains."""


def sizes(teacher: Teacher, student: Student) -> Sizes:
    """The sizes of `teacher` and of what it becomes."""
    c = count(teacher, student)
    if student.kind == "distil_xlstm":
        blocks = Blocks(teacher.hidden_size, teacher.num_hidden_layers).parameters
        return Sizes(c.root - teacher.hidden_size + blocks, blocks, c.teacher, 0, blocks)
    return Sizes(c.total, c.layers * c.new, c.teacher, c.layers * (c.new - c.idle), c.total - c.layers * c.idle)


def count(teacher: Teacher, student: Student) -> Counts:
    """The counts for `teacher` with the mixers of `student`, a hybrid, in it."""
    hidden, dim = teacher.hidden_size, teacher.head_dim
    heads, kv = teacher.num_attention_heads, teacher.num_key_value_heads
    matrices = hidden * dim * (2 * heads + 2 * kv) + 3 * hidden * teacher.intermediate_size
    small = 2 * hidden  # norms
    small += {
        "qwen2": dim * (heads + 2 * kv),  # biases of q, k, v
        "qwen3": 2 * dim,  # norms of q and k, per head
        "olmo2": dim * (heads + kv),  # … over all heads
        "olmo3": dim * (heads + kv),
    }.get(teacher.family, 0)
    width = hidden if student.gate_input == "hidden" else 3 * dim
    maps, gates, output = 2 * heads * dim * dim, 2 * heads * (hidden + 1), heads * (width + 1)
    idle = (0 if student.use_gates else gates) + (0 if student.use_window else output)
    root = hidden * teacher.vocab_size * (1 if teacher.tie_word_embeddings else 2) + hidden
    return Counts(
        layers=teacher.num_hidden_layers,
        layer=matrices + small + maps + gates + output,
        new=maps + gates + output,
        idle=idle,
        linear=matrices + maps + gates + output,
        root=root,
    )
