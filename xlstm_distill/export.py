"""`xdl export RUN DEST`: a finished student as a Hugging Face folder that loads without this package.

config.json (with `auto_map`)  *.py (what it names)  LICENSE-CODE     remote code: the files of `xlstm_distill.model`
*.safetensors  tokenizer, chat template, generation_config.json      the student's own files, copied
README.md  export.json                                               model card; hashes of every file
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import DONE, Mistake
from xlstm_distill.contract.files import folder_atomic, write_json
from xlstm_distill.contract.job import code_version
from xlstm_distill.contract.manifest import Manifest, outputs_of, read_manifest, verify_outputs
from xlstm_distill.contract.schema import Config
from xlstm_distill.evaluate.card import model_card
from xlstm_distill.evaluate.collect import read_config
from xlstm_distill.evaluate.exported import Exported
from xlstm_distill.evaluate.models import ModelPlace, model_places
from xlstm_distill.merge import ModelFolder

AUTO_MAP = {
    "hybrid_xlstm": {
        "AutoConfig": "configuration.HybridConfig",
        "AutoModelForCausalLM": "modeling.HybridForCausalLM",
    },
    "distil_xlstm": {
        "AutoConfig": "distil_xlstm.DistilXLSTMConfig",
        "AutoModelForCausalLM": "distil_xlstm.DistilXLSTMForCausalLM",
    },
}
"""`model_type` → Auto class → file.class. There is no AutoModel: no decoder is a model of its own without its head."""
NOT_STUDENTS = ("teacher", "window")
"""Models of a run that are not exported: the second is a student with a branch switched off, for comparison."""
CODE = Path(__file__).parent / "model"
SPDX = "# SPDX-License-Identifier: Apache-2.0\n"
MACHINE_KEYS = ("name_or_path", "tokenizer_file", "is_local", "local_files_only")
"""Ends of keys with which transformers notes where and how something was loaded: paths of this machine."""
REWRITTEN = ("config.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Student:
    """A finished student of a run."""

    place: ModelPlace
    manifest: Manifest
    """Of the job that made it."""


def finished_students(run: Path, config: Config) -> dict[str, Student]:
    """The students that the run has made, by name."""
    found = {}
    for name, place in model_places(run / "jobs", config).items():
        manifest = read_manifest(run / "jobs" / place.job / "manifest.json") if place.job else None
        if manifest is not None and name not in NOT_STUDENTS:
            found[name] = Student(place, manifest)
    return found


def choose_student(run: Path, config: Config, name: str = "") -> Student:
    """The student `name`; without a name the merged one, else the one that was finished last.

    Raises:
        Mistake: there is none, or its files are not those that its manifest lists.
    """
    students = finished_students(run, config)
    if not students:
        raise Mistake(f"export: {run.name} has no finished student yet; see xdl status {run.name}")
    if not name:
        name = "merged" if "merged" in students else max(students, key=lambda n: students[n].manifest.finished)
    if name not in students:
        places = model_places(run / "jobs", config)
        known = name in places and bool(places[name].job) and name not in NOT_STUDENTS
        what = "is not finished" if known else "is no student that this run makes"
        raise Mistake(f"--model {name}: {what}; finished: {', '.join(students)}")
    student = students[name]
    if wrong := verify_outputs(student.manifest, student.place.folder.parent):
        job = student.place.job
        raise Mistake(f"export: {name}: {wrong}; remove the manifest.json of {job} and launch again")
    return student


def check_destination(run: Path, destination: Path) -> Path:
    """`destination` without links.

    Raises:
        Mistake: something is there already, or it lies inside the run.
    """
    resolved = destination.expanduser().resolve()
    if resolved.is_relative_to(run.resolve()):
        raise Mistake(f"export: {destination} lies inside the run; give a folder outside of {run}")
    if resolved.exists() and not resolved.is_dir():
        raise Mistake(f"export: {destination} is a file; give a folder that is new or empty")
    if resolved.is_dir() and any(resolved.iterdir()):
        raise Mistake(f"export: {destination} is not empty; remove it or give another folder")
    return resolved


def export(run: Path, destination: Path, name: str = "") -> Exported:
    """Write a finished student of `run` to `destination`, whole or not at all.

    Args:
        run: `runs/NAME`.
        destination: a new or empty folder outside of the run.
        name: `merged`, `aligned` or an expert; empty: `choose_student`'s.

    Raises:
        Mistake: there is no such student, it is damaged, or `destination` cannot be written.
    """
    config = read_config(run)
    student = choose_student(run, config, name)
    resolved = check_destination(run, destination)
    exported = describe(run, config, student)
    try:
        with folder_atomic(resolved) as beside:
            copy_student(student, beside, AUTO_MAP[exported.hybrid.model_type])
            copy_code(beside, exported.hybrid.model_type)
            (beside / "README.md").write_text(model_card(exported), encoding="utf-8")
            write_json(beside / "export.json", record(exported, beside))
    except OSError as error:
        raise Mistake(f"export: {destination} cannot be written ({error.strerror or error})") from error
    return exported


def describe(run: Path, config: Config, student: Student) -> Exported:
    """What the card and `export.json` say of a student.

    Raises:
        Mistake: its folder holds another kind of model, or one that this version cannot read.
    """
    from transformers import AutoConfig

    import xlstm_distill.model  # noqa: F401 registers the students

    folder = student.place.folder
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if raw.get("model_type") not in AUTO_MAP:
        raise Mistake(f"export: {folder} is a {raw.get('model_type')}, not a hybrid xLSTM")
    try:
        hybrid = AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise Mistake(f"export: {folder}/config.json: {str(error).splitlines()[0]}") from error
    return Exported(run, config, student.place, hybrid, list(ModelFolder(folder).entries.values()))


def copy_student(student: Student, destination: Path, auto_map: Mapping[str, str]) -> None:
    """Copy the student's files; those of transformers' settings lose what is of this machine, and name `auto_map`.

    Raises:
        Mistake: a copy has not the hash that the manifest gives.
    """
    source, manifest = student.place.folder, student.manifest
    prefix = f"{source.name}/"
    own = {name.removeprefix(prefix): file for name, file in manifest.outputs.items() if name.startswith(prefix)}
    for name in own:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, destination / name)
    if wrong := verify_outputs(replace(manifest, outputs=own), destination, deep=True):
        found = wrong.replace(str(destination), str(source))
        raise Mistake(f"export: {found}; remove the manifest.json of {manifest.job} and launch again")
    for name in REWRITTEN:
        if (destination / name).is_file():
            _rewrite(destination / name, {"auto_map": auto_map} if name == "config.json" else {})


def _rewrite(path: Path, added: dict[str, Any]) -> None:
    settings = {**without_machine(json.loads(path.read_text(encoding="utf-8"))), **added}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_machine(value: Any) -> Any:
    """`value` without the keys, at any depth, that say where something lay when it was loaded."""
    if isinstance(value, dict):
        return {k: without_machine(v) for k, v in value.items() if not k.endswith(MACHINE_KEYS)}
    return [without_machine(v) for v in value] if isinstance(value, list) else value


def code_files(model_type: str = "hybrid_xlstm") -> list[Path]:
    """The files of `xlstm_distill.model` that loading needs: those of `AUTO_MAP`, and what they import."""
    from transformers.dynamic_module_utils import get_relative_import_files

    starts = [CODE / f"{where.partition('.')[0]}.py" for where in AUTO_MAP[model_type].values()]
    needed = [Path(file) for start in starts for file in get_relative_import_files(start)]
    return sorted({*starts, *needed})


def copy_code(destination: Path, model_type: str) -> None:
    """Write the modelling code and its licence."""
    for file in code_files(model_type):
        text = file.read_text(encoding="utf-8")
        (destination / file.name).write_text(text if text.startswith(SPDX) else SPDX + text, encoding="utf-8")
    (destination / "LICENSE-CODE").write_text(licence_text(), encoding="utf-8")


def licence_text() -> str:
    """The licence of this package, from its installation or the checkout.

    Raises:
        Mistake: neither has it.
    """
    try:
        text = distribution("xdl").read_text("licenses/LICENSE")
    except PackageNotFoundError:
        text = None
    checkout = Path(__file__).parents[1] / "LICENSE"
    if not text and checkout.is_file():
        text = checkout.read_text(encoding="utf-8")
    if not text:
        raise Mistake("export: the licence of xdl is missing from its installation; install xdl again")
    return text


def record(exported: Exported, folder: Path) -> dict[str, Any]:
    """`export.json`: what was exported, from which manifests, and size and hash of each file."""
    return {
        "run": exported.run.name,
        "model": exported.place.name,
        "teacher": exported.teacher,
        "manifests": {name: manifest.digest for name, manifest in exported.manifests.items()},
        "code": code_version(),
        "files": outputs_of(folder),
    }


def main(argv: list[str]) -> int:
    """`export RUN_DIR DEST [--model NAME]`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="xdl export", description="A student as a Hugging Face folder.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("destination", type=Path, metavar="dest", help="folder to make")
    parser.add_argument("--model", default="", help="merged, aligned or an expert's name")
    arguments = parser.parse_args(argv)
    exported = export(arguments.run, arguments.destination, arguments.model)
    print(
        f"{exported.place.name} of {exported.run.name}, {exported.parameters / 1e6:,.1f} M parameters "
        f"({exported.dtype}), in {arguments.destination}"
    )
    print(f'load it with AutoModelForCausalLM.from_pretrained("{arguments.destination}", trust_remote_code=True)')
    return DONE
