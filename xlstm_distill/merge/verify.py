"""Whether the experts of a run belong together: finished, as their manifests say, and from one student."""

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_value
from xlstm_distill.contract.job import JobFolder, plain
from xlstm_distill.contract.manifest import Manifest, read_manifest, verify_outputs

MODEL = "student"
"""Folder of the model in a job's output."""


@dataclass(frozen=True)
class Verified:
    """A model whose manifest stands."""

    folder: Path
    hashes: dict[str, str]
    """Name of a safetensors file → its xxh64 by the manifest; empty for a folder of the user's."""
    origin: str
    """What it started from: the digest of the alignment's manifest, or the folder given instead with its hash."""
    started_from: dict[str, str]
    """The same hashes of the folder given instead."""


def verify_experts(folder: JobFolder) -> dict[str, Verified]:
    """The merge's experts, whose weights are still to be hashed (`merge.read`); every other file has its hash.

    Raises:
        Mistake: a manifest is missing or changed, a file has changed, or two started from different students.
    """
    found = {name: _verify_expert(folder, name) for name in folder.config.specialists}
    _refuse_other_origin(folder, found)
    return found


def _verify_expert(folder: JobFolder, name: str) -> Verified:
    job = f"distill-{name}"
    path = folder.sibling(job)
    manifest = read_manifest(path / "manifest.json")
    if manifest is None:
        raise Mistake(f"merge: expert {name} is not finished (no {path}/manifest.json); launch again")
    if dict(manifest.identity) != plain(JobFolder.read(path).job.identity):
        raise Mistake(
            f"merge: expert {name}: its manifest.json and its config.yaml name different settings; "
            f"remove its manifest.json and launch again"
        )
    began = dict(manifest.facts.get("started_from", {}))
    origin = manifest.inputs.get("align") or f"{manifest.identity.get('student.init_from', '')} ({hash_value(began)})"
    return Verified(folder.input(job) / MODEL, _hashes(manifest, folder.input(job), f"expert {name}"), origin, began)


def _hashes(manifest: Manifest, output: Path, owner: str) -> dict[str, str]:
    """Hashes of the model's weights, after everything else was compared with its own."""
    weights = {
        file: expected
        for file, expected in manifest.outputs.items()
        if PurePosixPath(file).parent.name == MODEL and file.endswith(".safetensors")
    }
    rest = {file: expected for file, expected in manifest.outputs.items() if not file.endswith(".safetensors")}
    sizes = verify_outputs(replace(manifest, outputs=weights), output)
    if wrong := sizes or verify_outputs(replace(manifest, outputs=rest), output, deep=True):
        raise Mistake(f"merge: {owner}: {wrong}; remove its manifest.json and launch again")
    return {PurePosixPath(file).name: expected["xxh64"] for file, expected in weights.items()}


def _refuse_other_origin(folder: JobFolder, experts: dict[str, Verified]) -> None:
    first, *others = experts
    now = read_manifest(folder.sibling("align") / "manifest.json")
    for other in others:
        pair = {name: experts[name].origin for name in (first, other)}
        if len(set(pair.values())) == 1:
            continue
        told = [f"{name} from {_told(origin, now.digest if now else '')}" for name, origin in pair.items()]
        raise Mistake(
            f"merge: experts {first} and {other} start from different students: {', '.join(told)}; "
            f"launch again to distil both from the same one"
        )


def _told(origin: str, now: str) -> str:
    """An origin in words; `now`: digest of the alignment that stands."""
    if "/" in origin:
        return f"student.init_from={origin}"
    return f"the alignment {origin}" + (", which stands" if origin == now else ", which does not stand any more")


def verify_base(folder: JobFolder, experts: dict[str, Verified]) -> Verified:
    """The student that the experts started from.

    Raises:
        Mistake: the alignment that stands is another one, or a file of it has changed.
    """
    if given := folder.config.student.init_from:
        expert = next(iter(experts.values()))
        return Verified(Path(given), expert.started_from, expert.origin, expert.started_from)
    manifest = read_manifest(folder.sibling("align") / "manifest.json")
    first, origin = next((name, expert.origin) for name, expert in experts.items())
    if manifest is None or manifest.digest != origin:
        stands = manifest.digest if manifest else "none"
        raise Mistake(
            f"merge.method={folder.config.merge.method}: expert {first} was distilled from the alignment {origin}, and "
            f"{stands} stands; launch again"
        )
    student = {file: expected for file, expected in manifest.outputs.items() if file.startswith(f"{MODEL}/")}
    output = folder.input("align")
    hashes = _hashes(replace(manifest, outputs=student), output, "the aligned student")
    return Verified(output / MODEL, hashes, origin, {})
