"""Stage III: θ = Σ λ_i θ⁽ⁱ⁾ over all weights (paper §3.2, Eq. 14), streamed tensor by tensor over safetensors.

Each shard of the first expert is written again with its own header, byte for byte, and the merged tensors in the order
of the file: one tensor of each expert is in memory at a time, whatever the size of the model.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.manifest import Manifest, read_manifest, verify_outputs
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
VOLATILE_CONFIG_KEYS = {"_name_or_path", "transformers_version"}
"""Keys of config.json that say nothing about the model."""


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Merge the run's experts into `output/student`.

    Returns:
        Facts: the weights λ by expert, bytes and tensors written.

    Raises:
        Mistake: an expert is missing or damaged, stems from another student, or does not fit the others.
    """
    if world.rank > 0:
        return {}
    names = folder.config.experts
    if not names:
        raise Mistake("merge: experts=[]: nothing to merge; name at least one expert")
    verify_experts(folder)
    weights = scale_weights({name: folder.config.expert[name].merge_weight for name in names})
    students = [folder.input(f"distill-{name}") / "student" for name in names]
    with Metrics(folder.path, total=len(ModelFolder(students[0]).entries)) as metrics:

        def on_tensor(done: int) -> None:
            stop.check()
            metrics.log(done)

        counted = merge_linear(students, list(weights.values()), folder.output / "student", on_tensor)
    return {"weights": weights, **counted}


def verify_experts(folder: JobFolder) -> None:
    """Refuse experts whose manifest is missing, whose files changed, or that started from different students."""
    origins: dict[str, str] = {}
    for name in folder.config.experts:
        job = f"distill-{name}"
        manifest = read_manifest(folder.sibling(job) / "manifest.json")
        if manifest is None:
            raise Mistake(
                f"merge: expert {name} is not finished (no {folder.sibling(job)}/manifest.json); launch again"
            )
        if wrong := verify_outputs(manifest, folder.input(job), deep=True):
            raise Mistake(f"merge: expert {name}: {wrong}; remove its manifest.json and launch again")
        origins[name] = _origin(manifest)
    first, *others = origins
    for other in others:
        if origins[other] != origins[first]:
            raise Mistake(
                f"merge: experts {first} and {other} start from different students "
                f"({origins[first]}, {origins[other]}); distil both from the same one"
            )


def _origin(manifest: Manifest) -> str:
    """What the expert was distilled from: the digest of the alignment, or the folder given instead."""
    return manifest.inputs.get("align") or str(manifest.identity.get("student.init_from", ""))


def scale_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """`weights` scaled to sum to 1.

    Raises:
        Mistake: one is negative, or all are zero.
    """
    for name, weight in weights.items():
        if weight < 0:
            raise Mistake(f"expert.{name}.merge_weight={weight}: expected a number ≥ 0")
    total = sum(weights.values())
    if total <= 0:
        raise Mistake(f"merge: the weights of {', '.join(weights)} are all zero; give one a positive merge_weight")
    return {name: weight / total for name, weight in weights.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class ModelFolder:
    """The safetensors of a Hugging Face model folder, one file or many, without reading a tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def files(self) -> list[str]:
        """Names of the safetensors files.

        Raises:
            Mistake: the folder holds none.
        """
        if (self.path / INDEX).is_file():
            index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            return sorted(set(index["weight_map"].values()))
        if not (self.path / "model.safetensors").is_file():
            raise Mistake(f"{self.path}: no model.safetensors and no {INDEX}; expected a model saved as safetensors")
        return ["model.safetensors"]

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Tensor name → where it lies, in the order of the files' bytes."""
        found = {}
        for file in self.files:
            _, header = read_header(self.path / file)
            tensors = {name: spec for name, spec in header.items() if name != "__metadata__"}
            for name, spec in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
                found[name] = Entry(file, spec["dtype"], tuple(spec["shape"]), spec["data_offsets"][0])
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json without what says nothing about the model."""
        raw = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return {key: value for key, value in raw.items() if key not in VOLATILE_CONFIG_KEYS}

    def tensor(self, name: str) -> "Tensor":
        """Read one tensor."""
        from safetensors import safe_open

        with safe_open(self.path / self.entries[name].file, framework="pt") as file:
            return file.get_tensor(name)


def read_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a safetensors file before its data (8 bytes of length, then JSON), and that JSON."""
    with path.open("rb") as file:
        size = file.read(8)
        text = file.read(int.from_bytes(size, "little"))
    return size + text, json.loads(text)


def merge_linear(
    folders: Sequence[Path],
    weights: Sequence[float],
    destination: Path,
    on_tensor: Callable[[int], None] = lambda done: None,
) -> dict[str, int]:
    """Write Σ weights[i] · folders[i] to `destination`, whole or not at all.

    Floating tensors are summed in float32 (float64 stays float64) and saved in their own type; other tensors have to be
    equal. Config, tokenizer and the like are copied from the first folder. A tensor that two names share is stored once
    and stays so.

    Args:
        folders: Hugging Face model folders with equal architecture.
        weights: one factor per folder, used as given.
        destination: folder to make or replace.
        on_tensor: hears the number of tensors written, after each.

    Returns:
        `{"bytes": …, "tensors": …}`.

    Raises:
        Mistake: the folders do not fit together; the message names the first difference.
    """
    models = [ModelFolder(folder) for folder in folders]
    for other in models[1:]:
        refuse_difference(models[0], other)
    done = 0
    with folder_atomic(destination) as beside:
        for file in models[0].files:
            names = [name for name, entry in models[0].entries.items() if entry.file == file]
            with (beside / file).open("wb") as out:
                out.write(read_header(models[0].path / file)[0])
                for name in names:
                    _write(out, _weighted_sum(name, models, weights))
                    done += 1
                    on_tensor(done)
        _copy_rest(models[0].path, beside)
        size = sum((beside / file).stat().st_size for file in models[0].files)
    return {"bytes": size, "tensors": done}


def refuse_difference(first: ModelFolder, other: ModelFolder) -> None:
    """Raise a `Mistake` that names the first tensor or setting in which two models differ."""
    where = f"merge: {first.path} and {other.path} do not fit together"
    if only := sorted(set(first.entries) ^ set(other.entries)):
        owner = first if only[0] in first.entries else other
        raise Mistake(f"{where}: tensor {only[0]} stands only in {owner.path}")
    for name, mine in first.entries.items():
        theirs = other.entries[name]
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise Mistake(f"{where}: {name} is {mine.dtype}{list(mine.shape)} and {theirs.dtype}{list(theirs.shape)}")
    for key in sorted(set(first.config) | set(other.config)):
        if first.config.get(key) != other.config.get(key):
            raise Mistake(f"{where}: config.json: {key}={first.config.get(key)} and {other.config.get(key)}")
    for mine_path in sorted(first.path.glob("tokenizer*")):
        theirs_path = other.path / mine_path.name
        if not theirs_path.is_file() or theirs_path.read_bytes() != mine_path.read_bytes():
            raise Mistake(f"{where}: {mine_path.name} differs")


def _weighted_sum(name: str, models: Sequence[ModelFolder], weights: Sequence[float]) -> "Tensor":
    import torch

    first = models[0].tensor(name)
    if not first.is_floating_point():
        for other in models[1:]:
            if not torch.equal(first, other.tensor(name)):
                raise Mistake(
                    f"merge: {name} ({first.dtype}) differs between {models[0].path} and {other.path}; it has no mean"
                )
        return first
    total = torch.zeros(first.shape, dtype=torch.promote_types(first.dtype, torch.float32))
    for model, weight in zip(models, weights, strict=True):
        if weight:  # an expert with weight 0 must not spread its NaN
            total.add_(model.tensor(name).to(total.dtype), alpha=weight)
    return total.to(first.dtype)


def _write(out: BinaryIO, tensor: "Tensor") -> None:
    import torch

    out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _copy_rest(source: Path, destination: Path) -> None:
    """Config, tokenizer, index and whatever else is not a weight."""
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.startswith("."):
            shutil.copyfile(file, destination / file.name)
