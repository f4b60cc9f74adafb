"""Files that are whole or absent: written beside, flushed, renamed; and their hashes."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader or a crash sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `value` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Add `value` to a file of one JSON value per line, on a line of its own after one that a kill cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        torn = file.tell() and not _ends_line(file)
        file.write((b"\n" if torn else b"") + json.dumps(value, ensure_ascii=False).encode() + b"\n")


def _ends_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def read_lines(path: Path) -> list[Any]:
    """The values of a file of one JSON value per line; none where it does not exist, without lines that were cut."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def sync(path: Path) -> None:
    """fsync a file, or a folder's entries after a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path`; when the block ends well, flush it and rename it to `path` (replacing it)."""
    import shutil

    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for file in sorted(beside.rglob("*")):
        sync(file)
    sync(beside)
    if path.exists():
        shutil.rmtree(path)
    beside.replace(path)
    sync(path.parent)


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """xxh64 of a file's bytes, as 16 hexadecimal digits; `progress` hears the number of bytes of each block."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def hash_value(value: Any) -> str:
    """xxh64 of a JSON-like value, whatever the order of its keys."""
    return xxhash.xxh64(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
