"""A run of the second student that can be trained in a second: the tiny teacher with four layers, so two blocks."""

from dataclasses import replace
from pathlib import Path

import torch
from model_support import tiny_teacher
from train_support import job, make_config, make_shards, run

from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.model import DistilXLSTMForCausalLM, convert_distil

PAPER = {
    "targets": "online", "loss": "full", "gamma": 0.1, "beta": 0.8, "beta_end": 0.5, "temperature": 2.0,
    "temperature_end": 1.0, "hidden": 0.1, "mixer_lr": 0.0,
}  # fmt: skip


def distil_config(shards: Path):
    config = make_config(shards)
    student = replace(config.student, kind="distil_xlstm")
    return replace(config, student=student, distill=replace(config.distill, **PAPER))


def distil_run(root: Path, *, tied: bool = False) -> Path:
    """Folder of jobs of which fetch and align are done."""
    config, jobs = distil_config(make_shards(root / "shards")), root / "jobs"
    fetch = job(jobs, "fetch", config)
    tiny_teacher(num_hidden_layers=4, tie_word_embeddings=tied).save_pretrained(fetch.output / "teacher")
    write_json(fetch.output / "teacher.json", {"weights": "aa", "tokenizer": "bb"})
    fetch.finish({})
    aligned = job(jobs, "align", config)
    aligned.finish(run(aligned))
    return jobs


def distil_job(jobs: Path, name: str, *, world: dict | None = None, **changes: object) -> JobFolder:
    """A new distillation, with some of its settings changed."""
    config = distil_config(jobs.parent / "shards")
    distill, strategy = replace(config.distill, **changes), replace(config.strategy, **(world or {}))  # type: ignore[arg-type]
    config = replace(config, strategy=strategy, distill=distill)
    return job(jobs, name, config, "distill", inputs=("fetch", "align"), expert="math")


@torch.no_grad()
def tiny_distil(folder: Path, seed: int = 0, **changes: object) -> DistilXLSTMForCausalLM:
    """A student of a teacher with eight layers, converted through `folder`; every parameter off its start."""
    tiny_teacher(seed=seed, **{"num_hidden_layers": 8, **changes}).save_pretrained(folder / "teacher")
    (folder / "student").mkdir(parents=True)
    convert_distil(folder / "teacher", folder / "student", seed=seed)
    student = DistilXLSTMForCausalLM.from_pretrained(folder / "student", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.trained_parameters().values():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return student
