"""The seam between launcher and stages: a job folder, and the environment variables of its ranks.

runs/NAME/jobs/JOB/
    config.yaml      {job: …, config: …}, both resolved
    submit.sbatch    what Slurm got (Slurm only)
    logs/            one file per rank        tensorboard/   metrics.jsonl
    checkpoints/     step-N/, latest          stop           asks every rank to checkpoint and end (exit code 75)
    pieces/          one manifest per finished piece    heartbeats/ ledger.jsonl ends stop.json   what befell it
    output/          what the job makes       manifest.json  written last: the job is done
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import read_yaml, write_atomic, yaml_text
from xlstm_distill.contract.manifest import Manifest, outputs_of, read_manifest, verify_outputs, write_manifest
from xlstm_distill.contract.schema import Config, Placement, build

UNFINISHED = "unfinished"
"""File in a job folder: rank 0 could not finish the job, so that the others need not wait for its manifest."""
STOP_SECONDS = "stop.json"
"""File of a job folder: `{"seconds": …}` between a request to stop and the end of the process, as measured."""


@dataclass(frozen=True)
class Job:
    """One node of the graph: a stage with its settings and its place to run."""

    name: str
    """Unique in the run: the stage's name, or `distill-EXPERT`."""
    stage: str
    """Which function of `xlstm_distill.stages` runs."""
    identity: Mapping[str, Any]
    """The settings that change the output, flat."""
    inputs: tuple[str, ...] = ()
    """Names of the jobs whose manifests must stand before this one starts."""
    expert: str = ""
    """The expert that a distill job makes."""
    pieces: tuple[str, ...] = ()
    """Names of independent parts, each with a manifest of its own; empty: the job is one piece."""
    tokens: int = 0
    """Token budget; a larger one extends the job. 0 where the stage has none."""
    placement: Placement = field(default_factory=Placement)
    """Where it runs."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of its job, from the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    element: int = 0
    """Index of this array element; it takes the pieces ≡ element mod elements."""
    elements: int = 1
    local_size: int = 0
    """Ranks on this node; 0: all of them."""

    @classmethod
    def from_environment(cls) -> "World":
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, XDL_ELEMENT, XDL_ELEMENTS; absent: one."""
        number = lambda name, default: int(os.environ.get(name, str(default)))  # noqa: E731
        return cls(
            number("RANK", 0),
            number("WORLD_SIZE", 1),
            number("LOCAL_RANK", 0),
            number("XDL_ELEMENT", 0),
            number("XDL_ELEMENTS", 1),
            number("LOCAL_WORLD_SIZE", 0),
        )


@dataclass(frozen=True)
class JobFolder:
    """A job's folder, its job and its configuration."""

    path: Path
    job: Job
    config: Config

    @classmethod
    def read(cls, path: Path) -> "JobFolder":
        """Read `path/config.yaml`.

        Raises:
            Mistake: there is none, or it does not fit the schema.
        """
        try:
            raw = read_yaml((path / "config.yaml").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise Mistake(f"{path}: not a job folder (no config.yaml in it)") from error
        except yaml.YAMLError as error:
            raise Mistake(f"{path}/config.yaml: not YAML ({str(error).splitlines()[0]})") from error
        if not isinstance(raw, Mapping) or set(raw) != {"job", "config"}:
            raise Mistake(f"{path}/config.yaml: expected the keys job and config")
        identity = raw["job"].pop("identity", {})
        job = build(_JobFields, raw["job"], "job")
        return cls(path, Job(identity=identity, **vars(job)), build(Config, raw["config"]))

    def write(self) -> None:
        """Write `config.yaml`, atomically."""
        raw = {"job": asdict(self.job), "config": asdict(self.config)}
        write_atomic(self.path / "config.yaml", yaml_text(plain(raw)), durable=False)

    def sibling(self, name: str) -> "Path":
        """Folder of another job of the same run."""
        return self.path.parent / name

    def input(self, name: str) -> Path:
        """`output/` of another job of the same run."""
        return self.sibling(name) / "output"

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def stop_file(self) -> Path:
        return self.path / "stop"

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def input_digests(self) -> dict[str, str]:
        """Digest of each input's manifest.

        Raises:
            Mistake: a manifest is missing, or one of its files is missing or has another size.
        """
        digests = {}
        for name in self.job.inputs:
            manifest = read_manifest(self.sibling(name) / "manifest.json")
            if manifest is None:
                raise Mistake(
                    f"{self.job.name}: needs {name}, which is not finished (no {self.sibling(name)}/manifest.json)"
                )
            if wrong := verify_outputs(manifest, self.input(name)):
                raise Mistake(f"{self.job.name}: input {name}: {wrong}; remove its manifest.json and launch again")
            digests[name] = manifest.digest
        return digests

    def finish(self, facts: Mapping[str, Any], piece: str = "") -> Manifest:
        """Hash the output (of a piece: `output/PIECE`) and write the manifest: from now on it is done."""
        manifest = Manifest(
            job=self.job.name,
            stage=self.job.stage,
            identity=dict(self.job.identity),
            tokens=self.job.tokens,
            inputs=self.input_digests(),
            outputs=outputs_of(self.output / piece),
            facts=dict(facts),
            code=code_version(),
        )
        write_manifest(self.piece_path(piece) if piece else self.manifest_path, manifest)
        return manifest

    def piece_path(self, piece: str) -> Path:
        """Manifest of one piece."""
        return self.path / "pieces" / f"{piece}.json"

    def piece_done(self, piece: str) -> Manifest | None:
        """The manifest of a finished piece of this very job, or None when the piece has to be done (again)."""
        manifest = read_manifest(self.piece_path(piece))
        if manifest is None or manifest.identity != plain(self.job.identity) or manifest.inputs != self.input_digests():
            return None
        return None if verify_outputs(manifest, self.output / piece) else manifest

    def my_pieces(self, world: World) -> list[str]:
        """The pieces of this array element that are still to do."""
        mine = self.job.pieces[world.element :: world.elements]
        return [piece for piece in mine if not self.piece_done(piece)]


@dataclass(frozen=True)
class _JobFields:
    """`Job` without the free-form identity, for `build`."""

    name: str
    stage: str
    inputs: tuple[str, ...] = ()
    expert: str = ""
    pieces: tuple[str, ...] = ()
    tokens: int = 0
    placement: Placement = field(default_factory=Placement)


def plain(value: Any) -> Any:
    """`value` with tuples as lists and mappings as dicts, as JSON and YAML give it back."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def code_version() -> dict[str, str]:
    """Version of the installed package, and the commit when it runs from a checkout or a snapshot of one."""
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    try:
        record = {"version": version("xdl")}
    except PackageNotFoundError:
        record = {"version": "0+unknown"}
    root = Path(__file__).parents[2]
    if (root / "commit.json").is_file():  # a snapshot
        return dict(json.loads((root / "commit.json").read_text(encoding="utf-8")))
    if (root / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if git.returncode == 0:
            record["commit"] = git.stdout.strip()
    return record
