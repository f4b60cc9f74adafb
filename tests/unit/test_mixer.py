"""A whole mixer is Eq. 11: output and gradients of every parameter against a per-token loop in float64."""

import pytest
import torch
from model_support import naive_mixer, tiny_student

LENGTH = 9


def run_mixer(student, layer, x):
    base = student.model
    cos_sin = base.rotary_emb(x, torch.arange(x.shape[1])[None])
    return student.mixers[layer](x, cos_sin)[0]


def relative(found, wanted):
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp_min(1e-30))


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("llama", {}),
        ("llama", {"feature_map": "hedgehog"}),
        ("llama", {"sinks": 0, "window": 1}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("olmo2", {}),
    ],
)
def test_output_and_gradients_are_those_of_equation_11(tmp_path, family, choices):
    choices = {"window": 3, "sinks": 2, "chunk": 4, **choices}
    _, student = tiny_student(tmp_path, family, **choices)
    mixer, config = student.mixers[1], student.config.base
    torch.manual_seed(3)
    x = torch.randn(1, LENGTH, config.hidden_size).requires_grad_()
    out = run_mixer(student, 1, x)
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()

    names = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
    y = x.detach().double()[0].requires_grad_()
    wanted = naive_mixer(
        names, y, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, window=choices["window"],
        sinks=choices["sinks"], base=config.rope_parameters["rope_theta"], eps=config.rms_norm_eps,
        hedgehog=choices.get("feature_map") == "hedgehog",
    )  # fmt: skip
    (wanted * weights[0].double()).sum().backward()
    assert relative(out[0], wanted) < 1e-4
    assert relative(x.grad[0], y.grad) < 1e-4
    for name, parameter in mixer.named_parameters():
        if name == "k_proj.bias":  # adds the same to a whole row of scores but for the rotation: tiny
            torch.testing.assert_close(parameter.grad.double(), names[name].grad, atol=1e-3, rtol=1e-2)
        else:
            assert relative(parameter.grad, names[name].grad) < 1e-4, name


def test_the_start_is_the_specified_one(tmp_path):
    _, student = tiny_student(tmp_path, random=False)
    for mixer in student.mixers:
        eye = torch.eye(mixer.head_dim).expand(mixer.heads, -1, -1)
        assert mixer.query_map.equal(eye)
        assert mixer.key_map.equal(eye)
        assert mixer.input_gate.bias.eq(0).all()
        torch.testing.assert_close(mixer.forget_gate.bias, torch.linspace(3, 6, mixer.heads))
        assert mixer.output_gate.bias.eq(-4).all()
        assert all(g.weight.eq(0).all() for g in (mixer.input_gate, mixer.forget_gate, mixer.output_gate))


def test_features_never_fall_below_the_floor(tmp_path):
    _, student = tiny_student(tmp_path)
    mixer = student.mixers[0]
    features = mixer.feature_map(1e4 * torch.randn(1, 4, 5, mixer.head_dim), mixer.query_map)
    assert features.dtype == torch.float32
    assert features.min() >= 0.99e-12


def test_the_gate_hook_sees_the_gate_of_every_layer(tmp_path):
    _, student = tiny_student(tmp_path)
    seen = {}
    for mixer in student.mixers:
        mixer.gate_hook = lambda layer, gate, real: seen.setdefault(layer, gate.shape)
    student(torch.arange(6)[None])
    assert seen == {0: (1, 4, 6, 1), 1: (1, 4, 6, 1)}
