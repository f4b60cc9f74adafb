"""Token shards → the units in which their targets are made: one shard of one split each, finished or not.

    output/PIECE/priors/DIGEST.bin         what its samples were coded with
    output/PIECE/SPLIT/00000/              targets of shard 0: an MDS folder with a note of its own, whole or absent
    output/SOURCE/SPLIT/index.json         all of them in the order of the token shards
    output/SOURCE/SPLIT/targets.json       the note of all of them

With `parts=N` piece i takes the shards ≡ i modulo N of each split. The joined index does not depend on N.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.schema import Config
from xlstm_distill.data import priors
from xlstm_distill.data.shards import read_index, sequence_of
from xlstm_distill.teacher.index import data_digest, read_note, write_note

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Unit:
    """One token shard, or as much of it as is asked for."""

    tokens: Path
    """Folder of its split."""
    piece: Path
    """Output folder of the piece that it belongs to."""
    source: str
    split: str
    number: int
    """Of the shard in its split."""
    first: int
    """Its first sample in the split."""
    count: int
    """Samples."""
    content: str
    """Hash of the token shard."""

    @property
    def folder(self) -> Path:
        """Where its targets go."""
        return self.piece / self.split / f"{self.number:05d}"

    def batches(self, size: int) -> list[range]:
        """Its samples, in runs of `size`."""
        end = self.first + self.count
        return [range(start, min(start + size, end)) for start in range(self.first, end, size)]

    def note(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """What its note has to say."""
        return {**index, "shard": self.content, "samples": self.count}

    def done(self, index: Mapping[str, Any]) -> dict[str, Any] | None:
        """Its note, when it is finished, whole, and made with these settings from this shard."""
        try:
            note = read_note(self.folder)
            shards = read_index(self.folder)
        except Mistake:
            return None
        files = [shard["raw_data"] for shard in shards]
        whole = all(_size(self.folder / file["basename"]) == file["bytes"] for file in files)
        same = all(note.get(key) == value for key, value in self.note(index).items())
        known = priors.path_of(self.piece, str(note.get("prior"))).is_file()
        return note if whole and same and known else None


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


@dataclass(frozen=True)
class Piece:
    """What one array element makes of a source."""

    name: str
    config: Config
    tokens: Path
    """Folder of the token shards, `SOURCE/SPLIT` below."""
    output: Path
    """Of the job."""

    @property
    def source(self) -> str:
        return self.name.partition("/")[0]

    @property
    def part(self) -> int:
        return int(self.name.partition("/")[2] or 0)

    @property
    def folder(self) -> Path:
        return self.output / self.name

    @cached_property
    def units(self) -> list[Unit]:
        """Its shards.

        Raises:
            Mistake: the token shards are missing or of another length.
        """
        parts = self.config.sources[self.source].parts
        return [unit for split in SPLITS for unit in self.all_units(split) if unit.number % parts == self.part]

    def all_units(self, split: str) -> list[Unit]:
        """Those of all pieces of the source."""
        folder, limit = self.tokens / self.source / split, self.config.cache.max_samples
        if (length := sequence_of(folder)) != self.config.data.sequence:
            raise Mistake(f"data.sequence={self.config.data.sequence}: the shards in {folder} hold samples of {length}")
        found, first = [], 0
        parts = self.config.sources[self.source].parts
        for number, shard in enumerate(read_index(folder)):
            size = int(shard["samples"])
            count = min(size, max(0, limit - first)) if limit else size
            if count:
                piece = self.folder if parts == 1 else self.output / self.source / str(number % parts)
                files = shard.get("zip_data") or shard["raw_data"]
                content = str(files["hashes"].get("xxh64", ""))
                found.append(Unit(folder, piece, self.source, split, number, first, count, content))
            first += size
        return found

    def clear(self, index: Mapping[str, Any]) -> None:
        """Remove what an earlier start left that is no longer asked for."""
        notes = {unit.folder: unit.done(index) for unit in self.units}
        for split in SPLITS:
            for folder in (self.folder / split).glob("[0-9]*/"):
                if not notes.get(folder):
                    shutil.rmtree(folder)
        known = {priors.path_of(self.folder, note["prior"]) for note in notes.values() if note}
        for file in (self.folder / priors.FOLDER).glob("*.bin"):
            if file not in known:
                file.unlink()


def join(units: Iterable[Unit], source: Path, split: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """Make `source/split` the MDS folder of these finished units, in their order; nothing is copied but priors.

    Returns:
        The note: `priors` are those of its samples, `data` is the digest of the token shards.
    """
    folder, shards, notes = source / split, [], []
    units = list(units)
    for unit in units:
        notes.append(read_note(unit.folder))
        for shard in read_index(unit.folder):
            place = Path(os.path.relpath(unit.folder, folder)) / shard["raw_data"]["basename"]
            shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": place.as_posix()}})
        if unit.piece != source:
            priors.write_prior(source, priors.read_prior(unit.piece, notes[-1]["prior"]))
    write_json(folder / "index.json", {"version": 2, "shards": shards})
    note = {
        **index,
        **{key: notes[0][key] for key in ("vocab_size", "dtype")},
        "data": data_digest(units[0].tokens),
        "priors": sorted({note["prior"] for note in notes}),
        "samples": sum(note["samples"] for note in notes),
        "target_bytes": sum(note["target_bytes"] for note in notes),
    }
    write_note(folder, note)
    return note
