"""Small model folders and finished experts to merge."""

import json

import torch
from safetensors.torch import load_file, save_file

from xlstm_distill.contract.job import Job, JobFolder
from xlstm_distill.contract.schema import Config, Expert, Merge, Teacher
from xlstm_distill.merge.read import HashedFolder
from xlstm_distill.merge.weights import TensorWeights
from xlstm_distill.merge.write import Experts, Recipe, write_merge


class NoStop:
    def check(self):
        pass


def tensors(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(5, 3).to(dtype), "b.bias": torch.randn(7).to(dtype), "steps": torch.arange(4)}


def model_folder(path, content, **config):
    path.mkdir(parents=True)
    save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (path / "tokenizer.json").write_text("{}")
    return path


def merge(destination, folders, weights, base=None, parts=None, seed=0, on_tensor=lambda: None, **settings):
    """Merge folders, named 0, 1, …; returns what was written."""
    models = {str(i): HashedFolder(folder, {}, f"expert {i}") for i, folder in enumerate(folders)}
    experts = Experts(models, HashedFolder(base, {}, "the start") if base else None)
    given = TensorWeights(dict(zip(models, weights, strict=True)), parts)
    write_merge(experts, Recipe(given, Merge(**settings), seed), destination, on_tensor)
    return load_file(destination / "model.safetensors") if (destination / "model.safetensors").is_file() else {}


def merged(tmp_path, given, weights, start=None, **settings):
    """`merge` of dictionaries of tensors."""
    number = len(list(tmp_path.iterdir()))
    folders = [model_folder(tmp_path / f"{number}-{i}", content) for i, content in enumerate(given)]
    base = model_folder(tmp_path / f"{number}-start", start) if start else None
    return merge(tmp_path / f"{number}-merged", folders, weights, base, **settings)


def run_folder(path, contents, start=None, inputs=("align",), **settings):
    """The merge job over finished experts {name: (weight, tensors)} of one alignment."""
    config = Config(
        teacher=Teacher("t", "llama", "folder", "t"),
        experts=tuple(contents),
        expert={name: Expert(merge_weight=weight) for name, (weight, _) in contents.items()},
        merge=Merge(**settings),
    )

    def job(name, stage, inputs=()):
        folder = JobFolder(path / "jobs" / name, Job(name, stage, {}, inputs), config)
        folder.output.mkdir(parents=True)
        folder.write()
        return folder

    align = job("align", "align")
    model_folder(align.output / "student", start or tensors(9))
    align.finish({})
    for name, (_, content) in contents.items():
        expert = job(f"distill-{name}", "distill", inputs)
        model_folder(expert.output / "student", content)
        expert.finish({})
    return job("merge", "merge", tuple(f"distill-{name}" for name in contents))
