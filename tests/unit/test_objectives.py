"""The layer-wise alignment equals what plain autograd makes of its definition."""

import pytest
import torch
from model_support import VOCABULARY, tiny_student

from xlstm_distill.objectives.align import LayerAlignment


def aligned(tmp_path, family="llama", window=4):
    teacher, student = tiny_student(tmp_path, family, window=window)
    student.requires_grad_(False)
    for parameter in student.mixer_parameters().values():
        parameter.requires_grad_(True)
    return teacher, student


def no_loss(hidden, head):
    return hidden.new_zeros(())


def layer_inputs(teacher, ids):
    """Input of each attention module of the teacher, and what it hands to W_o."""
    inputs, targets, handles = [], [], []
    for layer in teacher.model.layers:
        attention = layer.self_attn
        handles.append(
            attention.register_forward_pre_hook(
                lambda _, args, kwargs: inputs.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
            )
        )
        handles.append(attention.o_proj.register_forward_pre_hook(lambda _, args: targets.append(args[0])))
    with torch.no_grad():
        teacher(ids)
    for handle in handles:
        handle.remove()
    return inputs, targets


@pytest.mark.parametrize("family", ["llama", "olmo2", "olmo3"])
def test_alignment_errors_and_gradients_equal_a_layer_by_layer_computation(tmp_path, family):
    teacher, student = aligned(tmp_path, family)
    ids = torch.randint(3, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(0))
    objectives = [LayerAlignment(train=True) for _ in student.mixers]
    inputs, targets = layer_inputs(teacher, ids)
    wanted = []
    positions = torch.arange(15)[None]
    rotary = student.model.rotary_emb
    for n, mixer in enumerate(student.mixers):
        x = inputs[n]
        kinds = getattr(student.config.base, "layer_types", None)
        cos_sin = rotary(x, positions, kinds[n]) if family == "olmo3" else rotary(x, positions)
        mixed = mixer.mix(mixer.project(x, cos_sin), None).transpose(1, 2).flatten(2)
        error = (targets[n] - mixed).square().sum()
        error.backward()
        wanted.append((error.detach(), targets[n].square().sum()))
    gradients = {name: p.grad.clone() for name, p in student.mixer_parameters().items()}
    student.zero_grad()
    for mixer, objective in zip(student.mixers, objectives, strict=True):
        mixer.objective = objective
    with torch.no_grad():
        student(input_ids=ids, objective=no_loss)
    for objective, (error, norm) in zip(objectives, wanted, strict=True):
        torch.testing.assert_close(objective.error, error, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(objective.norm, norm, rtol=1e-4, atol=1e-5)
    for name, parameter in student.mixer_parameters().items():
        difference = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp_min(1e-12)
        assert difference < 1e-4, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "olmo3"])
def test_the_stream_is_the_teachers(tmp_path, family):
    teacher, student = aligned(tmp_path, family)
    for mixer in student.mixers:
        mixer.objective = LayerAlignment(train=False)
    ids = torch.randint(3, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(1))
    found = []
    with torch.no_grad():
        student(input_ids=ids, objective=lambda hidden, head: found.append(hidden) or no_loss(hidden, head))
        wanted = teacher.model(ids).last_hidden_state
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=1e-4)


def test_only_the_mixers_own_parameters_get_gradients_and_sums_add_up(tmp_path):
    _, student = aligned(tmp_path)
    objectives = [LayerAlignment(train=True) for _ in student.mixers]
    for mixer, objective in zip(student.mixers, objectives, strict=True):
        mixer.objective = objective
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        student(input_ids=ids, objective=no_loss)
        once = objectives[0].error.clone()
        student(input_ids=ids, objective=no_loss)
    torch.testing.assert_close(objectives[0].error, 2 * once)
    own = student.mixer_parameters()
    assert all((parameter.grad is not None) == (name in own) for name, parameter in student.named_parameters())
    objectives[0].reset()
    assert objectives[0].error is None
    assert objectives[0].norm is None
