"""Students on disk, and the data folders that training reads."""

import importlib.util
import json
import shutil
from collections import deque
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic, hash_file
from xlstm_distill.contract.flops import StepFlops, step_flops
from xlstm_distill.contract.schema import Config, Source, Teacher
from xlstm_distill.data.stream import Part
from xlstm_distill.model import (
    DistilXLSTMConfig,
    DistilXLSTMForCausalLM,
    HybridConfig,
    HybridForCausalLM,
    StudentForCausalLM,
)
from xlstm_distill.model.kernel import check, name_of
from xlstm_distill.parallel.load import Weights, empty_model
from xlstm_distill.parallel.strategy import Strategy

SHARD_BYTES = 4 << 30


def student_choices(config: Config, layers: int) -> dict[str, Any]:
    """The fields of the student's configuration that the experiment sets, for a teacher of so many layers.

    Raises:
        Mistake: `student.layer_windows` names a layer that there is not.
    """
    student, others = config.student, ("kind", "init_from", "layer_windows")
    chosen = {name: value for name, value in vars(student).items() if name not in others}
    try:
        return chosen | ({"layer_windows": student.windows(layers)} if student.layer_windows else {})
    except ValueError as error:
        raise Mistake(f"student.{error}") from error


def weight_hashes(folder: Path) -> dict[str, str]:
    """Name of each safetensors file of a model folder → its xxh64."""
    return {file.name: hash_file(file) for file in sorted(folder.glob("*.safetensors"))}


def empty_student(folder: Path, kernel: str = "auto") -> StudentForCausalLM:
    """The student in `folder`, for training: its weights are still to be read (`Strategy.prepare`); evaluation mode;
    what never trains is frozen.

    Args:
        folder: of a converted student.
        kernel: computes the mLSTM of a hybrid.

    Raises:
        Mistake: there is no student there, or one that needs a package which is not installed.
    """
    if not (folder / "config.json").exists():
        raise Mistake(f"{folder}: no student there (no config.json)")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != DistilXLSTMConfig.model_type:
        config = HybridConfig.from_pretrained(folder, dtype=torch.float32, kernel=kernel)
        return empty_model(lambda: HybridForCausalLM(config)).eval()
    require_xlstm()
    own = DistilXLSTMConfig.from_pretrained(folder, dtype=torch.float32)
    model = empty_model(lambda: DistilXLSTMForCausalLM(own)).eval().requires_grad_(False)
    for parameter in model.trained_parameters().values():
        parameter.requires_grad_(True)
    return model


def require_xlstm() -> None:
    """Raise `Mistake` where a Distil-xLSTM cannot be made."""
    if importlib.util.find_spec("xlstm") is None:
        raise Mistake("student=distil_xlstm: its blocks are the package xlstm's: pip install --no-deps 'xlstm>=2.0.6'")


def flops_per_token(
    stage: Literal["align", "distill"], model: StudentForCausalLM, sequence: int, *, online: bool = False
) -> StepFlops:
    """`contract.flops.step_flops` of this very model."""
    base, config = model.config.base, model.config
    names = [field.name for field in fields(Teacher) if isinstance(getattr(base, field.name, None), int)]
    shape = Teacher(
        **{"name": "", "family": base.model_type, "source": "folder", "path": ""}
        | {name: getattr(base, name) for name in names}
        | {"head_dim": config.head_dim}
    )
    return step_flops(stage, shape, config, sequence, online=online)


def check_kernel(model: StudentForCausalLM, strategy: Strategy) -> None:
    """Compare a hybrid's kernel (`model.config`) with float64, as this job will use it, and say which one it is.

    Raises:
        Mistake: it cannot run here, or is wrong.
    """
    if not isinstance(model, HybridForCausalLM):
        return
    config, mixer = model.config, model.mixers[0]
    features = mixer.head_dim * (2 if config.feature_map == "hedgehog" else 1)
    try:
        kernel = mixer.kernel_on(strategy.device)
        error = check(kernel, strategy.device, strategy.dtype, features, mixer.head_dim, config.chunk)
    except ValueError as wrong:
        raise Mistake(f"model.{wrong}") from wrong
    if strategy.world.rank == 0:
        print(f"mLSTM kernel: {name_of(kernel)}, within {error:.0e} of float64", flush=True)


def save_student(model: StudentForCausalLM, source: Path, destination: Path, strategy: Strategy) -> None:
    """Write the model's parameters as safetensors, with tokenizer and configuration from `source`. Collective.

    One parameter at a time is gathered; rank 0 writes shards of 4 GiB in float32. What did not train comes from
    `source` as it stands there: a strategy may hold it rounded.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    parameters = ((name, tensor) for name, tensor in strategy.whole(model, without=frozen) if name not in tied)
    if strategy.world.rank != 0:
        deque(parameters, maxlen=0)
        strategy.barrier()
        return
    with folder_atomic(destination) as beside:
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
                shutil.copyfile(file, beside / file.name)
        writer, files = ShardWriter(beside), Weights(source)
        for name in frozen:
            writer.add(name, files.read(name).float())
        for name, tensor in parameters:
            writer.add(name, tensor)
        writer.finish()
    strategy.barrier()


class ShardWriter:
    """Safetensors shards of at most `SHARD_BYTES`, and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[dict[str, str]] = []
        self.pending: dict[str, torch.Tensor] = {}
        self.weight_map: dict[str, str] = {}
        self.total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and sum(t.numel() * t.element_size() for t in self.pending.values()) + size > SHARD_BYTES:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.total += size

    def _flush(self) -> None:
        name = f"model-{len(set(self.weight_map.values())) + 1:05d}.safetensors"
        save_file(self.pending, self.folder / name, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(self.pending, name)
        self.pending = {}

    def finish(self) -> None:
        """Write what is left, and the index."""
        if self.pending:
            self._flush()
        index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def mixture(sources: Mapping[str, Source], shards: Path) -> list[Part]:
    """The training shards of a mixture with their weights.

    Raises:
        Mistake: a source has no shards there.
    """
    for name in sources:
        if not (shards / name / "train").is_dir():
            raise Mistake(f"{shards}: no training shards for source {name} (expected {shards / name / 'train'})")
    return [Part(shards / name / "train", source.weight) for name, source in sources.items() if source.weight > 0]
