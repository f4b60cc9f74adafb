"""The fused distillation loss and the layer-wise alignment equal what plain autograd makes of their definitions."""

import pytest
import torch
from model_support import VOCABULARY, tiny_student

from xlstm_distill.objectives.align import LayerAlignment
from xlstm_distill.objectives.distill import DenseTargets, SparseTargets, distillation_loss
from xlstm_distill.teacher.targets import sparse_targets

N, HIDDEN, TEACHER_HIDDEN, V, K = 23, 12, 10, 40, 6


def plain_loss(hidden, head, labels, weights, targets, kind, gamma, beta):
    """Eq. 13 written down, any dtype; gradients by autograd."""
    student = (hidden @ head.T).log_softmax(-1)
    ce = -student.gather(1, labels[:, None])[:, 0]
    if kind == "full":
        teacher = (targets.hidden @ targets.head_weight.T).to(hidden.dtype).log_softmax(-1)
    else:
        top = targets.log_probs.to(hidden.dtype)
        student_top = student.gather(1, targets.ids)
        if kind == "topk":
            teacher, student = top.log_softmax(-1), student_top.log_softmax(-1)
        else:
            outside = torch.ones(len(hidden), head.shape[0], dtype=torch.bool).scatter(1, targets.ids, False)
            tail = (student.exp() * outside).sum(1, keepdim=True)
            teacher = torch.cat([top, targets.tail_log_mass.to(hidden.dtype)[:, None]], 1)
            teacher = teacher - teacher.exp().sum(1, keepdim=True).log()
            student = torch.cat([student_top, tail.clamp_min(1e-300).log()], 1)
    kl = torch.where(teacher.exp() > 0, teacher.exp() * (teacher - student), 0.0).sum(1)
    return gamma * (ce @ weights) + beta * (kl @ weights), ce @ weights, kl @ weights


def problem(kind, top_k=K, seed=0):
    torch.manual_seed(seed)
    hidden, head = 2 * torch.randn(N, HIDDEN), torch.randn(V, HIDDEN)
    teacher, teacher_head = torch.randn(N, TEACHER_HIDDEN), torch.randn(V, TEACHER_HIDDEN)
    weights = (torch.rand(N) > 0.3).float() / 17
    targets = (
        DenseTargets(teacher, teacher_head)
        if kind == "full"
        else SparseTargets(*sparse_targets(teacher, teacher_head, top_k, 8))
    )
    return hidden, head, torch.randint(0, V, (N,)), weights, targets


def widened(targets):
    return type(targets)(*(x.double() if x.is_floating_point() else x for x in vars(targets).values()))


def assert_equal_to_plain(kind, given, gamma=0.9, beta=0.1, chunk=256):
    hidden, head, labels, weights, targets = given
    a, b = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    found = distillation_loss(a, b, labels, weights, targets, kind=kind, gamma=gamma, beta=beta, chunk=chunk)
    found.loss.backward()
    c, d = hidden.double().requires_grad_(), head.double().requires_grad_()
    loss, ce, kl = plain_loss(c, d, labels, weights.double(), widened(targets), kind, gamma, beta)
    loss.backward()
    for x, y in ((found.loss, loss), (found.ce, ce), (found.kl, kl), (a.grad, c.grad), (b.grad, d.grad)):
        torch.testing.assert_close(x.double(), y, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", ["full", "topk_tail", "topk"])
@pytest.mark.parametrize("chunk", [1, 5, 23, 256])
def test_value_and_gradients_are_those_of_autograd_whatever_the_chunk(kind, chunk):
    assert_equal_to_plain(kind, problem(kind), chunk=chunk)


@pytest.mark.parametrize("kind", ["full", "topk_tail", "topk"])
@pytest.mark.parametrize(("gamma", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_each_term_alone_and_other_weights(kind, gamma, beta):
    assert_equal_to_plain(kind, problem(kind), gamma, beta)


@pytest.mark.parametrize("kind", ["topk_tail", "topk"])
@pytest.mark.parametrize("top_k", [1, V - 1, V])
def test_one_outcome_and_the_whole_vocabulary(kind, top_k):
    assert_equal_to_plain(kind, problem(kind, top_k))


def test_with_the_whole_vocabulary_all_kinds_are_the_full_divergence():
    hidden, head, labels, weights, dense = problem("full")
    sparse = SparseTargets(*sparse_targets(dense.hidden, dense.head_weight, V, 8))
    settings = {"gamma": 0.9, "beta": 0.1}
    wanted = distillation_loss(hidden, head, labels, weights, dense, kind="full", **settings)
    for kind in ("topk", "topk_tail"):
        found = distillation_loss(hidden, head, labels, weights, sparse, kind=kind, **settings)
        torch.testing.assert_close(found.kl, wanted.kl, atol=1e-6, rtol=1e-5)


def test_a_teacher_that_is_the_student_costs_nothing():
    hidden, head, labels, weights, _ = problem("full")
    x = hidden.clone().requires_grad_()
    targets = SparseTargets(*sparse_targets(hidden, head, K, 8))
    loss = distillation_loss(x, head, labels, weights, targets, kind="topk_tail", gamma=0.0, beta=1.0)
    loss.loss.backward()
    assert abs(float(loss.kl)) < 1e-6
    assert x.grad.abs().max() < 1e-6


def test_masked_positions_count_for_nothing_whatever_stands_there():
    hidden, head, labels, weights, targets = problem("topk_tail")
    assert (weights == 0).any()
    x = hidden.clone().requires_grad_()
    settings = {"kind": "topk_tail", "gamma": 0.9, "beta": 0.1}
    before = distillation_loss(x, head, labels, weights, targets, **settings)
    before.loss.backward()
    assert x.grad[weights == 0].eq(0).all()
    other = torch.where(weights == 0, (labels + 1) % V, labels)
    torch.testing.assert_close(distillation_loss(x, head, other, weights, targets, **settings).loss, before.loss)


def test_a_confident_teacher_and_a_confident_student_stay_finite():
    hidden, head, labels, weights, _ = problem("topk_tail")
    x = (60 * hidden).requires_grad_()
    targets = SparseTargets(*sparse_targets(80 * hidden.flip(0), head, K, 8))
    for kind in ("topk_tail", "topk"):
        x.grad = None
        distillation_loss(x, head, labels, weights, targets, kind=kind, gamma=0.9, beta=0.1).loss.backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "given"), [("full", "topk"), ("topk", "full"), ("topk_tail", "full")])
def test_a_loss_and_targets_that_do_not_go_together_are_refused(kind, given):
    hidden, head, labels, weights, targets = problem(given)
    with pytest.raises(TypeError, match="do not go together"):
        distillation_loss(hidden, head, labels, weights, targets, kind=kind, gamma=1.0, beta=1.0)


def test_frozen_sides_get_no_gradient():
    hidden, head, labels, weights, targets = problem("topk")
    x = hidden.clone().requires_grad_()
    distillation_loss(x, head, labels, weights, targets, kind="topk", gamma=1.0, beta=1.0).loss.backward()
    assert x.grad is not None
    assert head.grad is None


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
