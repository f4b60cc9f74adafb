"""A finished run with a tiny student to export, and an environment with torch, transformers and nothing of ours."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from eval_support import job, tiny_tokenizer
from model_support import tiny_student, tiny_teacher
from packaging.requirements import Requirement

from xlstm_distill.contract.schema import Align, Config, Data, Distill, Expert, Source, Student, Teacher

TEACHER_FACTS = {
    "source": "hub", "path": "people/tiny", "revision": "abc123", "weights": "0123", "tokenizer": "4567",
    "license": "Apache-2.0",
}  # fmt: skip


def config(**changes):
    prose = Source(kind="text", path="/home/somebody/prose/*.txt", weight=0.25)
    maths = Source(kind="hub", path="people/maths", subset="easy", weight=0.75)
    values = {
        "teacher": Teacher("tiny", "llama", "hub", "people/tiny", license="Apache-2.0"),
        "experts": ("math", "code"),
        "student": Student(window=8, sinks=2),
        "data": Data(sources={"prose": prose, "maths": maths}, sequence=96),
        "expert": {
            "math": Expert({"maths": maths}, merge_weight=0.5),
            "code": Expert({"prose": prose}, merge_weight=0.5),
        },
        "align": Align(tokens=4096, batch=4),
        "distill": Distill(tokens=2048, batch=2),
    }
    return Config(**{**values, **changes})


def finished_run(folder, until="merge", settings=None, family="llama", **choices):
    """A run with every job up to `until` finished; returns it and the student, which is that of every job.

    `choices`: fields of the student's configuration, `tied` of the teacher.
    """
    settings = settings or config()
    run = folder / "run"
    seed = choices.pop("seed", 0)
    teacher = tiny_teacher(family, seed, tie_word_embeddings=choices.pop("tied", False), vocab_size=258)
    _, student = tiny_student(folder / "made", family, teacher=teacher, **choices)
    student.save_pretrained(folder / "saved", max_shard_size="60KB")
    tiny_tokenizer(chat=True).save_pretrained(folder / "saved")
    steps = {
        "fetch": ("fetch", (), {"teacher": TEACHER_FACTS}),
        "tokenize": ("tokenize", ("fetch",), {"maths": {"train": {"tokens": 12345}}}),
        "align": ("align", ("fetch", "tokenize"), {"tokens": 4096, "error_before": [0.4], "error_after": [0.1]}),
        "distill-math": ("distill", ("fetch", "align"), {"tokens": 2048, "steps": 10}),
        "distill-code": ("distill", ("fetch", "align"), {"tokens": 2048, "steps": 11}),
        "merge": ("merge", ("distill-math", "distill-code"), {"weights": {"math": 0.5, "code": 0.5}}),
    }
    (run / "jobs").mkdir(parents=True)
    (run / "graph.json").write_text("{}")
    for name, (stage, inputs, facts) in steps.items():
        made = job(run, settings, name, stage, inputs)
        if stage in ("align", "distill", "merge"):
            shutil.copytree(folder / "saved", made.output / "student")
        made.finish(facts)
        if name == until:
            break
    return run, student


def clean_environment(folder: Path) -> Path:
    """Python of a venv whose packages are links to torch, transformers and what these need, and to nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in _closure(["torch", "transformers"]).values():
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "bin/python"


def _closure(names):
    found = {}
    pending = list(names)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name not in found:
            found[name] = metadata.distribution(name)
            needs = map(Requirement, found[name].requires or ())
            pending += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def run_python(python, code, cwd, *arguments):
    """Output of `code` in an environment without PYTHONPATH, home or network."""
    environment = {
        "HOME": str(cwd), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
    }  # fmt: skip
    line = [str(python), "-c", code, *map(str, arguments)]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
