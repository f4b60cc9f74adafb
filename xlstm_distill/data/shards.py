"""Token shards on disk: MDS folders of samples of T + 1 tokens.

Columns: `tokens` and `document` int32 [T + 1], `mask` uint8 [T + 1]; with teacher targets also `targets`, the bytes of
`codec.encode` for T positions.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.data.remote import bring, is_remote, mirror

HASHES = ["sha1", "xxh64"]
"""Kept for every shard; readers check the second."""
COMPRESSION = "zstd:3"
TOKENS_NOTE = "tokens.json"
"""Name of the note beside the splits of a source."""


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
        targets: whether samples carry `targets`. Then nothing is compressed: the codec leaves nothing to gain, and
            uncompressed shards are read in place.
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


def join_parts(folder: Path, parts: Sequence[str], split: str) -> None:
    """Make `folder/split` the MDS folder of all samples of `folder/PART/split`, in their order; nothing is copied."""
    shards = []
    for part in parts:
        for shard in read_index(folder / part / split):
            files = {key: shard[key] for key in ("raw_data", "zip_data") if shard.get(key)}
            moved = {key: {**f, "basename": f"../{part}/{split}/{f['basename']}"} for key, f in files.items()}
            shards.append({**shard, **moved})
    write_json(folder / split / "index.json", {"version": 2, "shards": shards})


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The shards that the MDS folder's `index.json` lists.

    Raises:
        Mistake: there is no index, or none that can be read.
    """
    path = folder / "index.json"
    bring(path)
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


def write_tokens_note(folder: Path, tokenizer: str) -> None:
    """Write down by which tokenizer (its hash) the tokens of the source in `folder` were made."""
    write_json(folder / TOKENS_NOTE, {"tokenizer": tokenizer})


def token_folder(folder: JobFolder) -> Path:
    """Where a job's token shards are: those of the `tokenize` job, or `data.shards`, of which a remote one is mirrored
    in the run folder.

    Raises:
        Mistake: `data.shards` was made by another tokenizer than the teacher's, or its store does not answer.
    """
    shards = folder.config.data.shards
    if not shards:
        return folder.input("tokenize")
    root = mirror(shards, folder.path.parents[1] / "shards") if is_remote(shards) else Path(shards)
    for name in folder.config.sources:
        for split in ("train", "validation"):
            bring(root / name / split / "index.json")
        with suppress(Mistake):  # it may not be there: see _check_tokenizer
            bring(root / name / TOKENS_NOTE, tries=1)
        _check_tokenizer(root / name, folder.input("fetch") / "teacher.json")
    return root


def _check_tokenizer(folder: Path, teacher: Path) -> None:
    """Refuse a source's tokens when they were made by another tokenizer than the one of the fetched teacher."""
    path = folder / TOKENS_NOTE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["tokenizer"]
    except FileNotFoundError:
        print(f"{folder}: does not say by which tokenizer it was made (no {TOKENS_NOTE}); taken as it is", flush=True)
        return
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f"{path}: damaged, not the note of a tokenizer; copy it anew") from error
    expected = json.loads(teacher.read_text(encoding="utf-8"))["tokenizer"]
    if found != expected:
        raise Mistake(
            f"data.shards: {folder} was made with the tokenizer {found}, this teacher has {expected}; "
            f"tokenise for this teacher"
        )


def source_folders(folder: JobFolder) -> dict[str, Path]:
    """Source → folder of its token shards, of all sources of the run that a job belongs to."""
    root = token_folder(folder)
    return {source: root / source for source in folder.config.sources}
