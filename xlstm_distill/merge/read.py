"""A model's tensors, hashed in the pass that reads them: what is verified is what was merged, and is read once."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import xxhash

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.merge.folder import ModelFolder
from xlstm_distill.merge.linear import FLOATS, Raw

BLOCK = 1 << 22
"""Bytes read and hashed at one time: they are still in the cache of the processor when they are hashed."""


class HashedFile:
    """A file read from its beginning to its end, and its xxh64."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._digest = xxhash.xxh64()
        self._position = 0
        """Up to here the bytes are in the digest."""
        header = int.from_bytes(self._file.read(8), "little")
        self.data = 8 + header
        """Offset of the first tensor."""
        self._file.seek(0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read_into(self, into: memoryview, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on. Bytes passed over are hashed as well; ones before the last that
        was read are read again.

        Raises:
            Mistake: the file ends before.
        """
        if offset < self._position:
            self._file.seek(offset)
            self._fill(into)
            self._file.seek(self._position)
            return
        self._skip_to(offset)
        for begin in range(0, len(into), BLOCK):
            block = into[begin : begin + BLOCK]
            self._fill(block)
            self._digest.update(block)
        self._position += len(into)

    def digest(self) -> str:
        """xxh64 of the whole file, as 16 hexadecimal digits; reads what is left of it."""
        while block := self._file.read(BLOCK):
            self._digest.update(block)
        return self._digest.hexdigest()

    def _skip_to(self, offset: int) -> None:
        while self._position < offset:
            block = self._file.read(min(BLOCK, offset - self._position))
            if not block:
                self._cut()
            self._digest.update(block)
            self._position += len(block)

    def _fill(self, into: memoryview) -> None:
        done = 0
        while done < len(into):
            count = self._file.readinto(into[done:])
            if not count:
                self._cut()
            done += count

    def _cut(self) -> None:
        raise Mistake(f"{self.path}: ends before the tensors that its header names; make it again")


class HashedFolder(ModelFolder):
    """A model folder whose files have to have the hashes of a manifest.

    Asked for its tensors in the order of the files' bytes, it reads each byte once.

    Args:
        path: Hugging Face folder.
        hashes: name of a safetensors file → xxh64; a file that is not in it may hold anything.
        owner: whose it is, for messages: `expert math`.
    """

    def __init__(self, path: Path, hashes: Mapping[str, str], owner: str) -> None:
        super().__init__(path)
        self.hashes, self.owner = hashes, owner
        self._open: dict[str, HashedFile] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the files open in the block; at its end compare the hashes.

        Raises:
            Mistake: one differs.
        """
        with ExitStack() as stack:
            self._open = {file: HashedFile(self.path / file) for file in self.files}
            for opened in self._open.values():
                stack.callback(opened.close)
            try:
                yield
            except Mistake:  # what seems wrong with a tensor may be a damaged file
                self._verify()
                raise
            self._verify()

    def _verify(self) -> None:
        for file, expected in self.hashes.items():
            if file in self._open and (found := self._open[file].digest()) != expected:
                raise Mistake(
                    f"merge: {self.owner}: {self.path / file} has xxh64 {found}, its manifest says {expected}; "
                    f"remove its manifest.json and launch again"
                )

    def raw(self, name: str) -> Raw:
        """The bytes of one tensor; in `reading` only.

        Raises:
            Mistake: the file is cut short, or its header is wrong.
        """
        entry = self.entries[name]
        width = np.dtype(FLOATS[entry.dtype][0]).itemsize if entry.dtype in FLOATS else 0
        if width and entry.size != width * math.prod(entry.shape):
            raise Mistake(f"{self.path / entry.file}: {name} has other than the bytes of its shape; make it again")
        found = np.empty(entry.size, np.uint8)
        if entry.size:
            file = self._open[entry.file]
            file.read_into(found.data, file.data + entry.offset)
        return found
