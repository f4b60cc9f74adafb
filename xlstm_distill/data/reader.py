"""Random access to the samples of an MDS folder, each shard checked against its hash when it is first opened."""

import os
import tempfile
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_bytes_atomic
from xlstm_distill.data.remote import checked
from xlstm_distill.data.shards import import_streaming, read_index

HASH = "xxh64"


class Shards:
    """Random access to the samples of one MDS folder; each shard is checked against its hash when it is first opened.

    Compressed shards are unpacked once, into the hidden folder `.raw` beside them (no manifest counts hidden files, and
    it goes when the shards go), or below the temporary folder where that cannot be written. Files there are named by
    their hash and renamed into place, so threads, ranks and jobs share them without a lock.

    Raises:
        Mistake: a file is missing or damaged; the line names it.
    """

    def __init__(self, folder: Path) -> None:
        import_streaming()
        self.folder = folder
        self.index = read_index(folder)
        self.sizes = np.array([shard["samples"] for shard in self.index], np.int64)
        if not self.sizes.sum():
            raise Mistake(f"{folder}: holds no samples; give its source more documents")
        self._ends = self.sizes.cumsum()
        self._readers: dict[int, Any] = {}
        self._opening = [threading.Lock() for _ in self.index]  # a shard is fetched and unpacked by one of the threads

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        place = number - int(self._ends[shard] - self.sizes[shard])
        with self._opening[shard]:
            if shard not in self._readers:
                self._readers[shard] = self._open(shard)
        try:
            return dict(self._readers[shard].get_item(place))
        except FileNotFoundError:  # it was there when it was opened: unpack it anew, or name it
            self._readers[shard] = self._open(shard)
            return dict(self._readers[shard].get_item(place))

    def _open(self, shard: int) -> Any:
        from streaming.base.format import reader_from_json

        info = self.index[shard]
        file = self._unpacked(info) if info["zip_data"] else self._file(info["raw_data"])
        if not info["zip_data"]:
            _verified(file, info["raw_data"])
        info = {**info, "raw_data": {**info["raw_data"], "basename": file.name}}
        reader = reader_from_json(str(file.parent), "", info)
        reader.validate(allow_unsafe_types=False)
        return reader

    def _unpacked(self, info: Mapping[str, Any]) -> Path:
        raw = info["raw_data"]
        file = self._unpack_folder / f"{_hash(self.folder, raw)}.mds"
        if file.exists():
            try:
                _verified(file, raw, ask=False)
                return file
            except Mistake:
                pass  # cut short by a crash of the machine: unpack it again
        from streaming.base.compression import decompress

        packed = _verified(self._file(info["zip_data"]), info["zip_data"])
        write_bytes_atomic(file, decompress(info["compression"], packed), durable=False)
        return file

    def _file(self, info: Mapping[str, Any]) -> Path:
        """Where a file of the index lies; of a source in parts, in the folder of one."""
        return Path(os.path.normpath(self.folder / info["basename"]))

    @cached_property
    def _unpack_folder(self) -> Path:
        beside = self.folder / ".raw"
        try:
            beside.mkdir(exist_ok=True)
            if os.access(beside, os.W_OK):
                return beside
        except OSError:
            pass
        own = Path(tempfile.gettempdir()) / f"xdl-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        if own.stat().st_uid != os.getuid():
            raise Mistake(f"{own}: belongs to another user; set TMPDIR to a folder of your own")
        return own


def _verified(file: Path, info: Mapping[str, Any], ask: bool = True) -> bytes:
    """The bytes of a shard's file when they are those that were written.

    Args:
        file: to read.
        info: its part of the index.
        ask: whether to fetch it (again) where there is a remote, which has no unpacked ones.

    Raises:
        Mistake: it is missing or damaged.
    """
    from streaming.base.hashing import get_hash

    expected, data = _hash(file.parent, info), b""

    def problem() -> str:
        nonlocal data
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return "missing shard"
        right = len(data) == info["bytes"] and get_hash(HASH, data) == expected
        return "" if right else f"damaged shard ({HASH} or size differs from index.json)"

    if wrong := checked(file, problem) if ask else problem():
        advice = f"copy the shards anew, or remove {file.parent.parent} and launch again to make them anew"
        raise Mistake(f"{file}: {wrong}; {advice}")
    return data


def _hash(folder: Path, info: Mapping[str, Any]) -> str:
    """The hash that the index gives a file."""
    if HASH not in info["hashes"]:
        raise Mistake(
            f"{folder}/index.json: no {HASH} of {info['basename']}; write the shards with hashes=[sha1,xxh64]"
        )
    return str(info["hashes"][HASH])
