"""One student that is exported, and what its run recorded of it: the source of the model card and of `export.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.contract.manifest import Manifest, read_manifest
from xlstm_distill.contract.schema import Config, Source
from xlstm_distill.evaluate.collect import Measured, Results, collect
from xlstm_distill.evaluate.models import ModelPlace, model_places
from xlstm_distill.merge import Entry

if TYPE_CHECKING:
    from xlstm_distill.model import DistilXLSTMConfig, HybridConfig


@dataclass(frozen=True)
class Exported:
    """One finished student, and what its run recorded of it."""

    run: Path
    config: Config
    place: ModelPlace
    hybrid: "HybridConfig | DistilXLSTMConfig"
    """Its configuration, of either kind."""
    entries: list[Entry]
    """Its tensors."""

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """Job → manifest of everything that this student was made from, inputs first. One that was made again since is
        left out: it is not what the student was made from."""
        found: dict[str, Manifest] = {}

        def add(job: str, digest: str | None) -> None:
            manifest = read_manifest(self.run / "jobs" / job / "manifest.json")
            if job in found or manifest is None or digest not in (None, manifest.digest):
                return
            for name, expected in manifest.inputs.items():
                add(name, expected)
            found[job] = manifest

        add(self.place.job, None)
        return found

    @property
    def teacher(self) -> dict[str, Any]:
        """Name, place (no path of this machine), revision and hashes of the teacher."""
        teacher = self.config.teacher
        fetched = self.facts("fetch").get("teacher", {})
        where = {"hub": teacher.path, "wheel": f"Python package {teacher.path}"}.get(teacher.source, "a local folder")
        return {
            "name": teacher.name,
            "from": where + (f", {teacher.gguf_file}" if teacher.gguf_file else ""),
            "revision": fetched.get("revision", "") or teacher.revision,
            "weights_xxh64": fetched.get("weights", ""),
            "tokenizer_xxh64": fetched.get("tokenizer", ""),
            "license": fetched.get("license", "") or teacher.license,
        }

    @property
    def experts(self) -> list[str]:
        """Experts that it was made from."""
        return [name for name in self.config.experts if f"distill-{name}" in self.manifests]

    @property
    def mixtures(self) -> dict[str, Mapping[str, Source]]:
        """`align` or expert → the sources that it was trained on; none where the run was given finished shards."""
        if self.config.data.shards:
            return {}
        aligned = {"align": self.config.data.sources} if "align" in self.manifests else {}
        return {**aligned, **{name: self.config.expert[name].sources for name in self.experts}}

    @property
    def sources(self) -> dict[str, Source]:
        """Every source of `mixtures`, by name."""
        return {name: source for mixture in self.mixtures.values() for name, source in mixture.items()}

    @property
    def parameters(self) -> int:
        """Number of parameters; a tensor that is shared counts once."""
        return sum(math.prod(entry.shape) for entry in self.entries)

    @property
    def dtype(self) -> str:
        """Types of the stored tensors, as safetensors names them."""
        return ", ".join(sorted({entry.dtype for entry in self.entries}))

    @cached_property
    def results(self) -> Results:
        """What the run measured on these very models."""
        return collect(self.run)

    def measured(self, name: str) -> Measured | None:
        """What was measured on a model of the run as it stands now, or None."""
        place = model_places(self.run / "jobs", self.config)[name]
        piece = read_manifest(self.run / "jobs" / "eval" / "pieces" / f"{name}.json")
        current = read_manifest(self.run / "jobs" / place.job / "manifest.json") if place.job else None
        if piece is None or current is None or piece.inputs.get(place.job) != current.digest:
            return None
        return next((model for model in self.results.models if model.name == name), None)

    def outputs(self, job: str) -> Mapping[str, Mapping[str, Any]]:
        """Files of a job that it was made from, with sizes and hashes."""
        return self.manifests[job].outputs if job in self.manifests else {}

    def facts(self, job: str) -> Mapping[str, Any]:
        """Facts of a job that it was made from."""
        return self.manifests[job].facts if job in self.manifests else {}
