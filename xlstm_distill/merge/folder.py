"""The safetensors of a Hugging Face model folder, one file or many, and whether two such folders fit together."""

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xlstm_distill.contract.exitcode import Mistake

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
VOLATILE_CONFIG_KEYS = {"_name_or_path", "transformers_version"}
"""Keys of config.json that say nothing about the model."""


class Entry(NamedTuple):
    """Where one tensor lies."""

    file: str
    dtype: str
    """safetensors' name of it: `BF16`, `F32`, `I64`, …"""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte behind the file's header."""
    size: int
    """In bytes."""


class ModelFolder:
    """The safetensors of a Hugging Face model folder; nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def files(self) -> list[str]:
        """Names of the safetensors files; a lone one goes before an index, as it does for `from_pretrained`.

        Raises:
            Mistake: the folder holds none.
        """
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        if not (self.path / INDEX).is_file():
            raise Mistake(f"{self.path}: no {SINGLE} and no {INDEX}; expected a model saved as safetensors")
        index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Tensor name → where it lies, in the order of the files' bytes."""
        found = {}
        for file in self.files:
            _, header = read_header(self.path / file)
            tensors = {name: spec for name, spec in header.items() if name != "__metadata__"}
            for name, spec in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = spec["data_offsets"]
                found[name] = Entry(file, spec["dtype"], tuple(spec["shape"]), begin, end - begin)
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
    """The bytes of a safetensors file before its data (8 bytes of length, then JSON), and that JSON.

    Raises:
        Mistake: it is no safetensors file.
    """
    with path.open("rb") as file:
        size = file.read(8)
        length = int.from_bytes(size, "little")
        try:
            if length > path.stat().st_size:
                raise ValueError(f"its header is {length} bytes long, by its first 8 bytes")
            text = file.read(length)
            return size + text, dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise Mistake(f"{path}: not a safetensors file ({error})") from error


def refuse_difference(first: ModelFolder, other: ModelFolder) -> None:
    """Raise a `Mistake` that names the first tensor or setting in which two experts differ."""
    refuse_other_tensors(first, other)
    where = f"merge: {first.path} and {other.path} do not fit together"
    for name, mine in first.entries.items():
        if mine.dtype != (theirs := other.entries[name].dtype):
            raise Mistake(f"{where}: {name} is {mine.dtype} and {theirs}")
    for key in sorted(set(first.config) | set(other.config)):
        if first.config.get(key) != other.config.get(key):
            raise Mistake(f"{where}: config.json: {key}={first.config.get(key)} and {other.config.get(key)}")
    for mine_path in sorted(first.path.glob("tokenizer*")):
        theirs_path = other.path / mine_path.name
        if not theirs_path.is_file() or theirs_path.read_bytes() != mine_path.read_bytes():
            raise Mistake(f"{where}: {mine_path.name} differs")


def refuse_other_tensors(first: ModelFolder, other: ModelFolder) -> None:
    """Raise a `Mistake` that names the first tensor that one has alone or in another shape."""
    where = f"merge: {first.path} and {other.path} do not fit together"
    if only := sorted(set(first.entries) ^ set(other.entries)):
        owner = first if only[0] in first.entries else other
        raise Mistake(f"{where}: tensor {only[0]} stands only in {owner.path}")
    for name, mine in first.entries.items():
        if mine.shape != (theirs := other.entries[name].shape):
            raise Mistake(f"{where}: {name} is {list(mine.shape)} and {list(theirs)}")


def copy_rest(source: Path, destination: Path) -> None:
    """Config, tokenizer, index and whatever else is not a weight."""
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.startswith("."):
            shutil.copyfile(file, destination / file.name)
