"""A model loaded shard by shard is the model that transformers loads; what is wrong with its folder is one line."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from model_support import FAMILIES, tiny_student, tiny_teacher, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.model import HybridForCausalLM
from xlstm_distill.parallel.load import INDEX, SINGLE, materialise, read_weights
from xlstm_distill.teacher.frozen import empty_teacher
from xlstm_distill.train.students import empty_student

SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def load(empty, folder: Path):
    model = empty(folder)
    assert all(p.is_meta for p in model.parameters())
    before = dict(model.named_parameters())
    materialise(model, torch.device("cpu"))
    read_weights(model, folder)
    assert all(before[name] is p for name, p in model.named_parameters())  # an optimiser may hold them already
    return model


def assert_same(mine, theirs) -> None:
    """Parameters, buffers, ties and logits."""
    for which in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(model, which)(remove_duplicate=False)) for model in (mine, theirs))
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert tensor.dtype == b[name].dtype, name
            assert tensor.equal(b[name]), name
    ties = [model.lm_head.weight is model.model.embed_tokens.weight for model in (mine, theirs)]
    assert ties[0] == ties[1]
    assert mine(tokens()).logits.equal(theirs(tokens()).logits)


def both(folder: Path):
    """(ours, transformers') of the teacher and of the student in `folder`."""
    teacher, student = folder / "teacher", folder / "student"
    yield load(empty_teacher, teacher), AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    yield load(empty_student, student), HybridForCausalLM.from_pretrained(student, dtype=torch.float32)


@pytest.mark.parametrize(("family", "tied"), list(product(FAMILIES, (False, True))))
def test_teachers_and_students_of_every_family_are_those_of_from_pretrained(tmp_path, family, tied):
    tiny_student(tmp_path, family, tied=tied)
    for mine, theirs in both(tmp_path):
        assert not mine.training
        assert_same(mine, theirs.eval())


@pytest.mark.parametrize("scaling", SCALED)
def test_the_frequencies_of_a_scaled_rope_are_not_the_plain_ones(tmp_path, scaling):
    tiny_student(tmp_path, teacher=tiny_teacher(rope_parameters=SCALED[scaling]))
    plain = tiny_teacher().model.rotary_emb.inv_freq
    for mine, theirs in both(tmp_path):
        assert_same(mine, theirs.eval())
        assert not mine.model.rotary_emb.inv_freq.equal(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk_is_float32_in_training(tmp_path, dtype):
    tiny_student(tmp_path, teacher=tiny_teacher().to(dtype))
    for mine, theirs in both(tmp_path):
        assert {p.dtype for p in mine.parameters()} == {torch.float32}
        assert_same(mine, theirs.eval())


def test_several_shards_are_one_model(tmp_path):
    teacher = tiny_teacher()
    teacher.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(load(empty_teacher, tmp_path), teacher)


def test_a_single_file_goes_before_an_old_index_as_in_transformers(tmp_path):
    tiny_teacher(seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    index = (tmp_path / INDEX).read_text()
    tiny_teacher().save_pretrained(tmp_path)
    (tmp_path / INDEX).write_text(index)
    assert_same(load(empty_teacher, tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


@pytest.fixture
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher().save_pretrained(folder, max_shard_size="20KB")
    return folder


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(Mistake, match=match) as caught:
        load(empty_teacher, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def place(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


NORM = "model.norm.weight"


def change(folder: Path, **tensors) -> None:
    """Replace final norm's file by one with `tensors` changed; None: left out."""
    file = place(folder, NORM)
    kept = {NORM: None, **load_file(file), **{name.replace("_", "."): t for name, t in tensors.items()}}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, file, metadata={"format": "pt"})


def test_a_missing_file_is_named(sharded):
    file = place(sharded, NORM)
    file.unlink()
    refuse(sharded, f"{file.name}: not readable as safetensors")


@pytest.mark.parametrize("size", [0, 5, 300])
def test_a_file_cut_short_is_named(sharded, size):
    file = place(sharded, NORM)
    file.write_bytes(file.read_bytes()[:size])
    refuse(sharded, f"{file.name}: not readable as safetensors")


def test_no_weights_at_all_are_named(sharded):
    for file in sharded.glob("model*"):
        file.unlink()
    refuse(sharded, "no safetensors weights there")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    refuse(sharded, f"{INDEX}: damaged")


def test_a_tensor_missing_from_the_index_or_from_its_file_is_named(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "copy")
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"][NORM]
    (sharded / INDEX).write_text(json.dumps(index))
    refuse(sharded, f"holds no tensor {NORM}; is it the right model")
    change(tmp_path / "copy", model_norm_weight=None)
    refuse(tmp_path / "copy", f"holds no tensor {NORM}, though {INDEX} says so")


def test_an_untied_head_that_is_not_there_is_not_made_up(tmp_path):
    tiny_teacher(tie_word_embeddings=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert (tmp_path / SINGLE).exists()
    refuse(tmp_path, "holds no tensor lm_head.weight")


def test_another_shape_is_refused_with_both(sharded):
    change(sharded, model_norm_weight=torch.ones(33))
    refuse(sharded, rf"{NORM} has shape \(33,\), its config.json says \(32,\)")


def test_quantised_values_are_refused(sharded):
    change(sharded, model_norm_weight=torch.ones(32, dtype=torch.float8_e4m3fn))
    refuse(sharded, f"{NORM} is F8_E4M3; expected one of")
