"""A run that can be trained in a second: a random Llama, shards of random tokens with uneven masks, job folders."""

import itertools
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from model_support import VOCABULARY, tiny_teacher
from safetensors.torch import load_file

from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.job import Job, JobFolder, World
from xlstm_distill.contract.schema import (
    Align,
    Cache,
    Config,
    Data,
    Distill,
    Expert,
    Source,
    Strategy,
    Student,
    Teacher,
)
from xlstm_distill.data.shards import sample, shard_writer
from xlstm_distill.model import HybridForCausalLM
from xlstm_distill.runtime.metrics import read_metrics
from xlstm_distill.train import align, distill

SEQUENCE, BATCH, TOP_K = 16, 4, 5
SOURCES = {"mine": Source(weight=0.75, path="x"), "yours": Source(weight=0.25, path="y")}
COUNTS = {"train": 13, "validation": 5}
TOKENS_PER_STEP = BATCH * SEQUENCE
TRAINING = {
    "tokens": 6 * TOKENS_PER_STEP, "batch": BATCH, "micro_batch": 2, "validate_every": 3, "validation_samples": 6,
    "checkpoint_every": 2, "warmup": 0.2,
}  # fmt: skip


def make_shards(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for (name, _), (split, count) in itertools.product(SOURCES.items(), COUNTS.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        with shard_writer(folder / name / split, SEQUENCE, 1 << 12) as writer:
            for number in range(count):
                tokens = rng.integers(3, VOCABULARY, SEQUENCE + 1)
                mask = rng.random(SEQUENCE + 1) < (number % 4 + 1) / 5  # as in chats: some samples count for little
                writer.write(sample(tokens, mask, np.full(SEQUENCE + 1, number)))
    return folder


def make_config(shards: Path) -> Config:
    return Config(
        teacher=Teacher(name="tiny", family="llama", source="folder", path="x"),
        experts=("math",),
        student=Student(window=4, sinks=2, chunk=4),
        data=Data(shards=str(shards), sources=SOURCES, sequence=SEQUENCE),
        expert={"math": Expert(sources=SOURCES)},
        cache=Cache(top_k=TOP_K, micro_batch=4),
        align=Align(**TRAINING, lr=1e-2),
        distill=Distill(**TRAINING, lr=1e-3, mixer_lr=2e-3),
        strategy=Strategy(precision="float32", threads=1),
    )


def make_run(root: Path, *, tied: bool = False, **teacher: object) -> Path:
    """Folder of jobs of which fetch, align and cache are done; `teacher`: of its configuration."""
    from xlstm_distill.teacher import capture

    config = make_config(make_shards(root / "shards"))
    jobs = root / "jobs"
    fetch = job(jobs, "fetch", config)
    tiny_teacher(tie_word_embeddings=tied, **teacher).save_pretrained(fetch.output / "teacher")
    write_json(fetch.output / "teacher.json", {"weights": "aa", "tokenizer": "bb"})
    fetch.finish({})
    cache = job(jobs, "cache", config, inputs=("fetch",), pieces=tuple(SOURCES))
    capture.run(cache, World(), Never())
    cache.finish({})
    aligned = job(jobs, "align", config)
    run(aligned)
    aligned.finish({})
    return jobs


def job(jobs: Path, name: str, config: Config, stage: str = "", **fields: object) -> JobFolder:
    fields = {"identity": {"seed": config.seed}, **fields}
    made = JobFolder(jobs / name, Job(name, stage or name, **fields), config)  # type: ignore[arg-type]
    made.output.mkdir(parents=True, exist_ok=True)
    made.write()
    return made


def training_job(jobs: Path, name: str, stage: str, *, world: dict | None = None, **changes: object) -> JobFolder:
    """A new job of `stage`, with some of its settings changed."""
    config = make_config(jobs.parent / "shards")
    settings = replace(getattr(config, stage), **changes)  # type: ignore[arg-type]
    strategy = replace(config.strategy, **(world or {}))
    config = replace(config, strategy=strategy, **{stage: settings})
    inputs = ("fetch",) if stage == "align" else ("fetch", "align", "cache")
    return job(jobs, name, config, stage, inputs=inputs, expert="math" if stage == "distill" else "")


class Never:
    """A stop flag that nobody raises."""

    margin = 0.0

    def requested(self, also: bool = False) -> bool:
        return also

    def expect(self, seconds: float) -> None: ...

    def check(self) -> None: ...


class After(Never):
    """A stop flag that is raised after so many steps; with `phase="validation"` at so many forwards of validations."""

    def __init__(self, count: int, phase: str = "data") -> None:
        self.left, self.phase = count, phase

    def requested(self, also: bool = False) -> bool:
        if sys._getframe(1).f_locals["phase"] == self.phase:
            self.left -= 1
        return also or self.left < 0


def run(folder: JobFolder, stop: Never | None = None) -> dict:
    """Run the stage in this process."""
    stage = {"align": align, "distill": distill}[folder.job.stage]
    return stage.run(folder, World(), stop or Never())  # type: ignore[arg-type]


def load_student(folder: Path) -> HybridForCausalLM:
    """Through transformers, as users do."""
    return HybridForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights(folder: JobFolder) -> dict:
    """All tensors of the student that a job made."""
    return {k: v for f in (folder.output / "student").glob("*.safetensors") for k, v in load_file(f).items()}


def metrics(folder: JobFolder) -> list[dict]:
    """Records without what depends on the clock or the machine."""
    varies = ("time", "seconds", "tokens_per_s", "tokens_per_s_per_device", "mfu", "goodput", "restarts")
    groups = ("time/", "memory/", "pace/")
    return [
        {k: v for k, v in record.items() if k not in varies and not k.startswith(groups)}
        for record in read_metrics(folder.path)
    ]


@contextmanager
def small_disk(folder, size):
    """A file system of its own; skips where none may be mounted."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
