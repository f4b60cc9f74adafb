"""Files that are whole or absent: written beside, flushed, renamed; and their hashes."""

import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
import yaml


def beside(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`: hidden, and another one for each thread, process and node
    (nodes share folders)."""
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}-{threading.get_native_id()}.tmp")


def write_atomic(path: Path, text: str, durable: bool = True) -> None:
    """`write_bytes_atomic` of a text."""
    write_bytes_atomic(path, text.encode("utf-8"), durable)


def write_bytes_atomic(path: Path, data: bytes, durable: bool = True) -> None:
    """Replace `path` by `data` so that a reader or a crash of this process sees the old file or the new one, never a
    part; with `durable` also a crash of the machine, for which the disk is waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = beside(path)
    with written.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    written.replace(path)
    if durable:
        sync(path.parent)


def yaml_text(value: Any) -> str:
    """Plain values as YAML, in their order; by libyaml where PyYAML has it, ten times as fast."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True))


def read_yaml(text: str) -> Any:
    """The value of a YAML text; by libyaml where PyYAML has it.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


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
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a text in JSON may hold a U+2028
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
def exclusive(path: Path) -> Iterator[bool]:
    """Hold the lock of the file `path` for the block; yields whether it was free. It falls with the process, however
    that ends. Where the file system knows no locks it is always free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        else:
            yield True


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
