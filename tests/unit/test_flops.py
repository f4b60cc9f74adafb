"""FLOPs of a step: equal to what torch's counter sees and to pairs counted one by one."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from model_support import FAMILIES, VOCABULARY, tiny_student, tiny_teacher, tokens
from torch.utils.flop_counter import FlopCounterMode

from xlstm_distill.contract.flops import (
    causal_pairs,
    chunk_pairs,
    dense_flops,
    mixer_flops,
    step_flops,
    window_pairs,
)
from xlstm_distill.contract.schema import Student, Teacher
from xlstm_distill.objectives.align import LayerAlignment
from xlstm_distill.objectives.distill import SparseTargets, distillation_loss

LENGTH = 24


def counted(run):
    """FLOPs by operation: of matrices (linear layers), and of stacks of matrices (everything per head)."""
    with FlopCounterMode(display=False) as counter:
        run()
    by = Counter({str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()})
    return by["aten.mm"] + by["aten.addmm"], by["aten.bmm"] + by["aten.baddbmm"]


def objective(hidden, head):
    """CE and KL on made-up targets."""
    rows = hidden.flatten(0, 1)
    labels = torch.zeros(len(rows), dtype=torch.long)
    log_probs = torch.full((len(rows), 2), -1.0)
    targets = SparseTargets(torch.tensor([[0, 1]]).expand(len(rows), 2), log_probs, log_probs[:, 0])
    weights = torch.full((len(rows),), 1 / len(rows))
    return distillation_loss(rows, head, labels, weights, targets, kind="topk_tail", gamma=1.0, beta=1.0).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_of_every_family_are_counted_exactly(family):
    teacher = tiny_teacher(family)
    shape, ids = teacher.config, tokens(LENGTH)
    shape.head_dim = teacher.model.layers[0].self_attn.head_dim
    linear, _ = counted(lambda: teacher(input_ids=ids))
    assert linear == (dense_flops(shape) + 2 * shape.hidden_size * VOCABULARY) * ids.numel()


@pytest.mark.parametrize("choices", [{}, {"use_gates": False}, {"gate_input": "hidden"}])
def test_stage_ii_counts_the_students_linear_layers_three_times_the_head_included(tmp_path, choices):
    _, student = tiny_student(tmp_path, chunk=1, **choices)
    config, ids = student.config, tokens(LENGTH)
    idle = student.idle_parameters()
    student.requires_grad_(True)
    linear, _ = counted(lambda: student(input_ids=ids, objective=objective).loss.backward())
    gates = 0 if idle else 2 * 2 * config.hidden_size * config.num_attention_heads * config.num_hidden_layers
    head = 2 * config.hidden_size * VOCABULARY
    assert linear == 3 * (dense_flops(config) + gates + head) * ids.numel()
    whole = step_flops("distill", config, config, LENGTH)
    mixers = config.num_hidden_layers * mixer_flops(config, config, LENGTH).total
    assert whole.forward == pytest.approx(dense_flops(config) + head + mixers)
    assert (whole.teacher, whole.backward) == (0.0, 2 * whole.forward)


@pytest.mark.parametrize("feature_map", ["softmax", "hedgehog"])
@pytest.mark.parametrize("feature_rope", ["before", "after"])
def test_the_mlstm_its_feature_maps_and_its_gate_are_the_products_that_run_per_head(
    tmp_path, feature_map, feature_rope
):
    """With chunks of one position no product computes pairs that do not see each other. The window is left out: its
    kernel has no formula in torch's counter."""
    _, student = tiny_student(
        tmp_path, chunk=1, window=LENGTH, sinks=0, feature_map=feature_map, feature_rope=feature_rope
    )
    config, ids = student.config, tokens(LENGTH)
    mixer = mixer_flops(config, config, LENGTH)
    of_linear = 2 * 2 * config.hidden_size * config.num_attention_heads  # i and f
    model = config.num_hidden_layers * ids.numel() * (mixer.total - mixer.window - of_linear)
    _, forward = counted(lambda: student(input_ids=ids, objective=objective))
    _, both = counted(lambda: student(input_ids=ids, objective=objective).loss.backward())
    features = config.head_dim * (2 if feature_map == "hedgehog" else 1)
    # RoPE after φ runs the kernel twice; the first run computes a denominator that is thrown away.
    unused = feature_rope == "after" and 2 * config.num_attention_heads * features * len(student.mixers)
    assert forward == model + unused * ids.numel()
    # The kernel computes the scores of pairs again, which is not counted, and sums the gradient of the normaliser.
    assert both == pytest.approx(3 * model, rel=0.05)


def test_stage_i_counts_what_its_own_step_runs(tmp_path):
    _, student = tiny_student(tmp_path, chunk=1, window=LENGTH, sinks=0)
    config, ids = student.config, tokens(LENGTH)
    student.requires_grad_(False)
    for name, parameter in student.mixer_parameters().items():
        parameter.requires_grad_(name not in student.idle_parameters())
    for mixer in student.mixers:
        mixer.objective = LayerAlignment(train=True)
    with torch.no_grad():
        linear, heads = counted(lambda: student(input_ids=ids, objective=lambda hidden, head: hidden.new_zeros(())))
    step, mixer = step_flops("align", config, config, LENGTH), mixer_flops(config, config, LENGTH)
    layers, per_token = config.num_hidden_layers, ids.numel()
    gates = 2 * 2 * config.hidden_size * config.num_attention_heads * layers
    assert linear == (dense_flops(config) + 2 * gates) * per_token
    attention = 4 * config.num_attention_heads * config.head_dim * causal_pairs(LENGTH) / LENGTH * layers
    assert step.teacher == pytest.approx(dense_flops(config) + attention)
    per_head = (step.forward + step.backward - 2 * gates - layers * mixer.window) * per_token
    # Besides the scores the kernel computes the gradient of v, which nobody asked for.
    assert per_head < heads < 1.25 * per_head


@pytest.mark.parametrize("length", [1, 5, 8, 13, 30])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 2), (8, 8), (50, 3), (5, 40)])
def test_pairs_of_window_and_sinks_are_those_that_see_each_other(length, window, sinks):
    seen = [(t, s) for t in range(length) for s in range(t + 1) if t - s < window or s < sinks]
    assert window_pairs(length, window, sinks) == len(seen)


@pytest.mark.parametrize("length", [1, 4, 10])
@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
def test_pairs_within_chunks_and_causal_pairs_are_counted_one_by_one(length, chunk):
    before = [(t, s) for t in range(length) for s in range(t + 1)]
    assert causal_pairs(length) == len(before)
    assert chunk_pairs(length, chunk) == sum(t // chunk == s // chunk for t, s in before)


def test_a_layer_of_the_mixer_is_the_sum_over_its_tokens_written_as_loops():
    shape = Teacher("t", "llama", "folder", "x", num_hidden_layers=1, hidden_size=32, num_attention_heads=4, head_dim=8)
    choices, length = Student(window=6, sinks=2, chunk=5, feature_map="hedgehog"), 23
    dim, features, total = 8, 16, 0
    for _ in range(4):
        for t in range(length):
            total += 2 * 2 * dim * dim  # φ's matrix for q and k
            total += 2 * (32 + 32 + 3 * dim)  # i, f, o
            total += 2 * features * (dim + 1) + 2 * features * dim  # read S and z, write S
            for s in range(t + 1):
                if t - s < 6 or s < 2:
                    total += 4 * dim  # q·k and weight times v
                if t // 5 == s // 5:
                    total += 2 * features + 2 * dim
    assert mixer_flops(shape, choices, length).total * length == pytest.approx(total)


def test_windows_of_layers_count_each_for_its_own():
    shape = Teacher("t", "llama", "folder", "x", num_hidden_layers=3, hidden_size=32, num_attention_heads=4, head_dim=8)
    each = [mixer_flops(shape, Student(window=window), 64).window for window in (6, 20, 6)]
    student = Student(window=6, layer_windows={"1": 20})
    assert mixer_flops(shape, student, 64).window == pytest.approx(sum(each) / 3)


def test_an_8b_model_comes_near_six_flops_per_parameter_and_token():
    llama = {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
    }  # fmt: skip
    shape = Teacher("llama", "llama", "hub", "x", **llama)
    parameters = 8.03e9 - 128256 * 4096  # without the embedding
    step = step_flops("distill", shape, Student(), 4096, online=True)
    assert 6 * parameters < step.forward + step.backward < 6.3 * parameters
    assert step.total == step.teacher + step.forward + step.backward
    assert 2 * parameters < step.teacher < 2.2 * parameters
    aligned = step_flops("align", shape, Student(), 4096)
    assert aligned.teacher == step.teacher - 2 * 4096 * 128256
    assert aligned.forward + aligned.backward < 0.1 * aligned.teacher


def test_without_window_or_gates_nothing_is_counted_for_them():
    shape = Teacher("t", "llama", "folder", "x", num_hidden_layers=1, hidden_size=32, num_attention_heads=4, head_dim=8)
    mlstm = mixer_flops(shape, Student(use_window=False), 64)
    linear_attention = mixer_flops(shape, Student(use_window=False, use_gates=False), 64)
    assert mlstm.window == 0.0
    assert (mlstm.gates, linear_attention.gates) == (2 * 2 * 32 * 4, 0.0)
    window_alone = SimpleNamespace(**vars(Student()), windows=Student().windows, use_mlstm=False)
    assert mixer_flops(shape, window_alone, 64).total == mixer_flops(shape, Student(), 64).window
