"""Conversion of a teacher's folder, and the configuration."""

import hashlib
import json

import pytest
import torch
from data_support import make_tokenizer
from model_support import randomise, tiny_student, tiny_teacher, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.model import HybridConfig, HybridForCausalLM, convert
from xlstm_distill.train.align import make_initial


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "12kB"])
def test_conversion_keeps_every_tensor_and_leaves_the_teachers_files_untouched(tmp_path, tied, shard_size):
    teacher = tiny_teacher(tie_word_embeddings=tied)
    folder, target = tmp_path / "teacher", tmp_path / "student"
    teacher.save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "12kB")
    before = hashes(folder)
    target.mkdir()
    convert(folder, target, window=8)
    assert hashes(folder) == before
    student = HybridForCausalLM.from_pretrained(target)
    inherited = {n: p for n, p in student.state_dict().items() if n not in student.mixer_parameters()}
    assert inherited.keys() == teacher.state_dict().keys()
    assert all(p.equal(teacher.state_dict()[name]) for name, p in inherited.items())
    mapped = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert all((target / file).is_file() for file in mapped.values())
    assert len(list(target.glob("*.safetensors"))) == len(list(folder.glob("*.safetensors"))) + 1
    there, here = (AutoTokenizer.from_pretrained(place) for place in (folder, target))
    assert here("the quick fox").input_ids == there("the quick fox").input_ids
    assert here.chat_template == there.chat_template


def test_a_bfloat16_teacher_gives_a_bfloat16_student(tmp_path):
    tiny_student(tmp_path, teacher=tiny_teacher().bfloat16(), random=False)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    randomise(student)
    assert student(tokens(9)).logits.isfinite().all()


def test_teachers_that_cannot_be_converted_are_one_line(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(Mistake, match=r"gpt2: teacher of type 'gpt2' is not supported; supported: llama, .*olmo3$"):
        make_initial(tmp_path / "gpt2", tmp_path / "student", {})
    tiny_teacher().config.save_pretrained(tmp_path / "empty")
    with pytest.raises(Mistake, match=r"empty: no model.safetensors .*; fetch the teacher again"):
        make_initial(tmp_path / "empty", tmp_path / "student", {})
    assert not (tmp_path / "student").exists()
    with pytest.raises(ValueError, match="nothing would be mixed"):
        HybridConfig(use_mlstm=False, use_window=False)
