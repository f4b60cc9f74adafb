"""Teacher folder → student folder, shard by shard on disk: the teacher's tensors are copied as files, never loaded."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from .configuration import HybridConfig, StudentConfig
from .distil_xlstm import DistilXLSTMConfig, new_blocks
from .modeling import new_parameter_state

INDEX_FILE = "model.safetensors.index.json"
COPIED = (".json", ".jinja", ".txt", ".model")
"""Kinds of files of the teacher that belong to the tokenizer and to generation."""
KEPT = ("model.embed_tokens.weight", "lm_head.weight")
"""What a Distil-xLSTM takes from its teacher; the second where it is not tied to the first."""


def convert(teacher: Path, destination: Path, **choices: object) -> HybridConfig:
    """Write the untrained student of `teacher` to the existing, empty folder `destination`.

    Args:
        teacher: folder with config.json, safetensors and tokenizer. It is only read.
        destination: receives the teacher's shards, one more with the mixers' parameters, and an index.
        **choices: fields of `HybridConfig`.

    Raises:
        ValueError: the teacher's family is not supported.
        FileNotFoundError: the teacher has no safetensors.
    """
    base = AutoConfig.from_pretrained(teacher)
    config = HybridConfig(base, **choices)  # type: ignore[arg-type]
    weights = _weight_map(teacher)
    renamed = _shard_names(sorted(set(weights.values())))
    for old, new in renamed.items():
        shutil.copyfile(teacher / old, destination / new)
    state = new_parameter_state(HybridConfig(base, **choices), _dtype(teacher, weights))  # type: ignore[arg-type]
    mixers = _shard_name(len(renamed) + 1, len(renamed) + 1)
    save_file(state, destination / mixers, metadata={"format": "pt"})
    weights = {name: renamed[file] for name, file in weights.items()} | dict.fromkeys(state, mixers)
    config.architectures = ["HybridForCausalLM"]
    _complete(teacher, destination, config, weights)
    return config


def convert_distil(teacher: Path, destination: Path, seed: int = 0, **choices: object) -> DistilXLSTMConfig:
    """Write the untrained Distil-xLSTM of `teacher` to the existing, empty folder `destination`.

    Args:
        teacher: as for `convert`; its embedding and head are copied, the rest is left.
        destination: receives two shards, those and the blocks, and an index.
        seed: of the blocks' start.
        **choices: fields of `DistilXLSTMConfig`.

    Raises:
        ValueError: the teacher's family is not supported, or the choices do not fit its width.
        FileNotFoundError: the teacher has no safetensors.
    """
    config = DistilXLSTMConfig(AutoConfig.from_pretrained(teacher), **choices)  # type: ignore[arg-type]
    places = _weight_map(teacher)
    kept = {}
    for name in KEPT[: 1 if config.tie_word_embeddings else 2]:
        if name not in places:
            raise FileNotFoundError(f"{teacher}: no tensor {name} in its safetensors")
        with safe_open(teacher / places[name], framework="pt") as file:
            kept[name] = file.get_tensor(name)
    blocks = new_blocks(config, seed, kept[KEPT[0]].dtype)
    weights: dict[str, str] = {}
    for number, state in enumerate((kept, blocks), 1):
        save_file(state, destination / _shard_name(number, 2), metadata={"format": "pt"})
        weights |= dict.fromkeys(state, _shard_name(number, 2))
    config.architectures = ["DistilXLSTMForCausalLM"]
    _complete(teacher, destination, config, weights)
    return config


def _complete(teacher: Path, destination: Path, config: StudentConfig, weights: dict[str, str]) -> None:
    """What belongs to a folder besides its weights, a map from names to files: index, tokenizer, configurations."""
    total = sum((destination / name).stat().st_size for name in set(weights.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (destination / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for file in teacher.iterdir():
        if file.suffix in COPIED and file.is_file() and file.name not in ("config.json", INDEX_FILE):
            shutil.copyfile(file, destination / file.name)
    config.save_pretrained(destination)
    if not (destination / "generation_config.json").exists():
        GenerationConfig.from_model_config(config.base).save_pretrained(destination)


def _shard_names(files: list[str]) -> dict[str, str]:
    """The teacher's files → their names in the student, which has one more: a lone model.safetensors would hide it."""
    return {file: _shard_name(n, len(files) + 1) for n, file in enumerate(files, 1)}


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name → file; a lone file goes before an index, as it does for `from_pretrained`."""
    single = folder / "model.safetensors"
    if single.exists():
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    if not (folder / INDEX_FILE).exists():
        raise FileNotFoundError(f"{folder}: no {single.name} and no {INDEX_FILE}")
    return dict(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"])


def _dtype(folder: Path, weights: dict[str, str]) -> torch.dtype:
    name, file = next(iter(weights.items()))
    with safe_open(folder / file, framework="pt") as opened:
        return opened.get_tensor(name).dtype
