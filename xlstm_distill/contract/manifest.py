"""`manifest.json`: what a finished job (or one finished piece of it) made, from what, with which settings.

It is written last and atomically: a job is done when its manifest stands.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_file, hash_value, write_json

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The record of one finished job or piece."""

    job: str
    """Name of the job, e.g. `distill-math`."""
    stage: str
    """Name of its stage, e.g. `distill`."""
    identity: Mapping[str, Any]
    """The settings that change the output (see `launcher.plan`), flat: `{"student.window": 512, …}`."""
    tokens: int
    """Token budget that was consumed; a larger one extends the job. 0 where the stage has none."""
    inputs: Mapping[str, str]
    """Job name → `digest` of the manifest that it had when this job read it."""
    outputs: Mapping[str, Mapping[str, Any]]
    """Path relative to the job's `output/` → `{"bytes": int, "xxh64": str}`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the stage counted and measured (documents, tokens, losses, …), JSON values only."""
    code: Mapping[str, str] = field(default_factory=dict)
    """Version and commit of the code that ran: recorded, not part of the identity."""
    finished: str = ""
    """When, ISO 8601 in UTC."""
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Hash of what was made: settings, inputs and outputs, but not when and by which version."""
        return hash_value([self.stage, dict(self.identity), self.tokens, dict(self.inputs), dict(self.outputs)])


def outputs_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of every file below `folder`, hidden ones left out, links followed."""
    found = (Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)
    kept = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))
    return {f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "xxh64": hash_file(f)} for f in kept}


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` to `path`, atomically, with the time of now."""
    write_json(path, {**asdict(manifest), "finished": datetime.now(UTC).isoformat(timespec="seconds")})


def read_manifest(path: Path) -> Manifest | None:
    """The manifest at `path`, or None where there is none.

    Raises:
        Mistake: the file is not a manifest of a format that this version reads.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Mistake(f"{path}: not readable as a manifest ({error}); remove the file to redo the job") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise Mistake(f"{path}: not a manifest of format {FORMAT}; remove the file to redo the job")
    try:
        return Manifest(**raw)
    except TypeError as error:
        raise Mistake(f"{path}: not a whole manifest ({error}); remove the file to redo the job") from error


def verify_outputs(manifest: Manifest, output: Path, *, deep: bool = False) -> str | None:
    """What is wrong with the files under `output`, in one phrase, or None when all stand.

    Sizes are always compared; `deep` compares the hashes too.
    """
    for name, expected in manifest.outputs.items():
        file = output / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}"
        if deep and (found := hash_file(file)) != expected["xxh64"]:
            return f"{file} has xxh64 {found}, its manifest says {expected['xxh64']}"
    return None
