"""Token shards on disk: MDS folders of samples of T + 1 tokens, and the note that says whose targets they carry.

Columns: `tokens` and `document` int32 [T + 1], `mask` uint8 [T + 1]; with teacher targets also `targets`, the bytes of
`codec.encode` for T positions.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_json

HASHES = ["sha1", "xxh64"]
"""Kept for every shard; readers check the second."""
COMPRESSION = "zstd:3"
TARGETS_NOTE = "targets.json"
"""Name of the note beside the shards of a split."""


def import_streaming() -> ModuleType:
    """`streaming` without its vision, text and multimodal parts, which ask for torchvision and others.

    Raises:
        Mistake: mosaicml-streaming is not installed.
    """
    added = []
    for part in ("vision", "text", "multimodal"):
        if (name := f"streaming.{part}") not in sys.modules:
            sys.modules[name] = ModuleType(name)
            added.append(name)
    try:
        import streaming
    except ImportError as error:
        for name in added:
            del sys.modules[name]
        if error.name == "streaming":
            raise Mistake("mosaicml-streaming is not installed; run: xdl doctor --install-streaming") from error
        raise Mistake(f"mosaicml-streaming lacks {error.name or error}; run: xdl doctor --install-streaming") from error
    return streaming


def shard_writer(
    folder: Path, sequence: int, shard_bytes: int, *, targets: bool = False
) -> AbstractContextManager[Any]:
    """A writer of samples (see `sample`) into the new folder `folder`.

    Args:
        folder: made by the writer.
        sequence: T.
        shard_bytes: size at which a shard is closed, before compression.
        targets: whether samples carry `targets`. Then nothing is compressed: log-probabilities in float16 hardly
            shrink, and uncompressed shards are read in place.
    """
    import_streaming()
    from streaming import MDSWriter

    size = sequence + 1
    columns = {"tokens": f"ndarray:int32:{size}", "mask": f"ndarray:uint8:{size}", "document": f"ndarray:int32:{size}"}
    return MDSWriter(
        out=str(folder),
        columns=columns | ({"targets": "bytes"} if targets else {}),
        compression=None if targets else COMPRESSION,
        hashes=HASHES,
        size_limit=shard_bytes,
    )


def sample(tokens: NDArray[Any], mask: NDArray[Any], document: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """One sample in the columns' types, each [T + 1]."""
    return {
        "tokens": np.ascontiguousarray(tokens, np.int32),
        "mask": np.ascontiguousarray(mask, np.uint8),
        "document": np.ascontiguousarray(document, np.int32),
    }


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The shards that the MDS folder's `index.json` lists.

    Raises:
        Mistake: there is no index, or none that can be read.
    """
    path = folder / "index.json"
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["shards"])
    except FileNotFoundError as error:
        raise Mistake(
            f"{folder}: no token shards there (no index.json); run stage=tokenize or mend data.shards"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f"{path}: damaged, not an MDS index; remove {folder.parent} and launch again") from error


def count_samples(folder: Path) -> int:
    """Samples in an MDS folder."""
    return sum(int(shard["samples"]) for shard in read_index(folder))


def sequence_of(folder: Path) -> int:
    """T of an MDS folder whose samples hold T + 1 tokens.

    Raises:
        Mistake: there are no samples, or none with the column `tokens`.
    """
    for shard in read_index(folder):
        columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        kind, _, size = columns.get("tokens", "").rpartition(":")
        if kind == "ndarray:int32" and size.isdigit():
            return int(size) - 1
        raise Mistake(
            f"{folder}: shards with the columns {', '.join(columns)}; expected tokens as ndarray:int32:LENGTH"
        )
    raise Mistake(f"{folder}: holds no samples; give its source more documents")


def write_targets_note(folder: Path, note: Mapping[str, Any]) -> None:
    """Write down whose targets the shards in `folder` carry: teacher, tokenizer, top_k, codec, …"""
    write_json(folder / TARGETS_NOTE, dict(note))


def check_targets(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse targets of another teacher, tokenizer, top-k or codec.

    Args:
        folder: one split of one source, with teacher targets.
        expected: what its note has to say, key by key; the codec's version is checked besides.

    Raises:
        Mistake: there are no targets, or one value differs; the line shows both.
    """
    from xlstm_distill.data.codec import VERSION

    path = folder / TARGETS_NOTE
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Mistake(f"{folder}: holds no teacher targets (no {TARGETS_NOTE}); run stage=cache") from error
    except ValueError as error:
        raise Mistake(f"{path}: damaged, not JSON; remove {folder.parent} and launch again") from error
    for key, value in {"codec": VERSION, **expected}.items():
        if note.get(key) != value:
            raise Mistake(
                f"{path}: made with {key}={note.get(key)}, this run has {key}={value}; "
                f"use the settings that they were made with, or cache anew under another --name"
            )
