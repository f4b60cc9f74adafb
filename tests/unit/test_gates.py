"""Output gates: recorded over real positions, drawn, and said in the report."""

import copy
import pickle

import numpy as np
import pytest
import torch
from model_support import VOCABULARY, tiny_student, tiny_teacher

from xlstm_distill.model.gates import GateRecorder
from xlstm_distill.runtime.gate_map import gate_image
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.train.gates import HeldOutGates, gate_facts, log_gates


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tiny_student(tmp_path_factory.mktemp("student"))[1]


@pytest.fixture
def student(shared):
    return copy.deepcopy(shared)


def batch(lengths, seed=0):
    """Left-padded rows of random tokens, and their mask."""
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return ids.where(mask, torch.tensor(0)), mask.long()


def gates_of(student, ids):
    """float64 [layers, T, heads]: sigmoid(w·[q, k, v] / √d + b) of one unpadded row, from each layer's input."""
    found, handles = [], []

    def keep(mixer, arguments, options):
        x = options["hidden_states"] if "hidden_states" in options else arguments[0]
        q, k, v = (getattr(mixer, f"{name}_proj")(x)[0].double() for name in "qkv")
        rows = []
        for h in range(mixer.heads):
            own, group = (slice(n * mixer.head_dim, (n + 1) * mixer.head_dim) for n in (h, h // mixer.groups))
            joined = torch.cat([q[:, own], k[:, group], v[:, group]], -1) / mixer.head_dim**0.5
            weight, bias = (p[h].detach().double() for p in (mixer.output_gate.weight, mixer.output_gate.bias))
            rows.append(torch.sigmoid(joined @ weight + bias))
        found.append(torch.stack(rows, -1))

    for mixer in student.mixers:
        handles.append(mixer.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        student(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_the_means_are_those_of_each_row_alone_over_two_padded_batches_of_unequal_length(student):
    batches = [batch([9, 4, 1]), batch([14, 13], seed=1)]
    with student.record_gates() as gates, torch.no_grad():
        for ids, mask in batches:
            student(input_ids=ids, attention_mask=mask)
    rows = [row[keep.bool()] for ids, mask in batches for row, keep in zip(ids, mask, strict=True)]
    wanted = torch.cat([gates_of(student, row) for row in rows], 1).mean(1)
    assert wanted.std() > 0.05
    assert gates.means().shape == (2, 4)
    torch.testing.assert_close(gates.means(), wanted, atol=1e-5, rtol=1e-5)


def test_padding_that_is_not_finite_does_not_count(student):
    with GateRecorder(student) as gates:
        gate = torch.tensor([[torch.nan, 0.25, 0.5], [1.0, 0.0, 0.5]])[:, None, :, None].expand(2, 4, 3, 1)
        for mixer in student.mixers:
            mixer.gate_hook(mixer.layer_idx, gate, torch.tensor([[False, True, True], [True, True, True]]))
            mixer.gate_hook(mixer.layer_idx, gate[1:].expand(3, 4, 3, 1), torch.tensor([[True, False, False]]))
    assert gates.means().eq((0.75 + 1.5 + 3) / 8).all()


def test_ranks_add_up_what_they_saw(student):
    first, second = GateRecorder(student), GateRecorder(student)
    both = GateRecorder(student)
    for recorder, lengths in ((first, [8]), (second, [5, 2])):
        for attached in (recorder, both):
            with attached, torch.no_grad():
                ids, mask = batch(lengths)
                student(input_ids=ids, attention_mask=mask)
    other = []
    second.means(lambda sums: other.append(sums) or sums)
    torch.testing.assert_close(first.means(lambda sums: sums + other[0]), both.means())


def test_a_generation_counts_every_position_once(student):
    ids = batch([7])[0]
    with GateRecorder(student) as gates:
        whole = student.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    wanted = gates_of(student, whole[0, :-1]).mean(1)
    torch.testing.assert_close(gates.means(), wanted, atol=1e-5, rtol=1e-5)


def test_it_changes_no_output_and_keeps_no_graph(student):
    ids = batch([6])[0]
    plain = student(input_ids=ids).logits
    with GateRecorder(student) as gates:
        watched = student(input_ids=ids).logits
    assert watched.equal(plain)
    assert not gates.means().requires_grad
    watched.sum().backward()


def test_hooks_come_back_after_an_exception_and_the_student_still_pickles(student):
    def mine(*arguments):
        pass

    student.mixers[0].gate_hook = mine
    recorder = GateRecorder(student)
    with pytest.raises(IndexError), recorder:
        student(input_ids=torch.tensor([[VOCABULARY]]))
    with recorder:
        assert student.mixers[0].gate_hook is not mine
    assert student.mixers[0].gate_hook is mine
    assert student.mixers[1].gate_hook is None
    student.mixers[0].gate_hook = None
    with recorder, pytest.raises(RuntimeError, match="attached already"), recorder:
        pass
    assert all(mixer.gate_hook is None for mixer in student.mixers)
    pickle.dumps(student)


def test_without_a_forward_the_means_are_not_numbers(student):
    assert GateRecorder(student).means().isnan().all()


@pytest.mark.parametrize("branch", ["use_mlstm", "use_window"])
def test_a_student_without_a_gate_is_refused_in_one_line(tmp_path, branch):
    _, student = tiny_student(tmp_path, **{branch: False})
    with pytest.raises(ValueError, match=f"no output gate: {branch} is False") as caught:
        GateRecorder(student)
    assert "\n" not in str(caught.value)


def test_a_student_without_a_gate_trains_without_a_map(tmp_path):
    _, student = tiny_student(tmp_path, use_mlstm=False)
    gates = HeldOutGates(student)
    with gates.recording():
        student(input_ids=batch([3])[0])
    found = gates.means(None)
    with Metrics(tmp_path, 1, tensorboard=True) as metrics:
        assert log_gates(metrics, 1, found) == {}
    assert found == []
    assert gate_facts(found) == {}


def test_a_model_that_is_no_student_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM: no output gates there"):
        GateRecorder(tiny_teacher())


@pytest.mark.slow
def test_layers_compiled_one_by_one_give_the_same_means_and_are_compiled_once_more_only(tmp_path):
    _, student = tiny_student(tmp_path, teacher=tiny_teacher(num_hidden_layers=12))
    wanted = GateRecorder(student)
    batches = [batch([n, n], seed=n)[0] for n in (16, 16, 16, 16)]
    with wanted, torch.no_grad():
        for ids in batches:
            student(input_ids=ids)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for layer in student.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    gates = GateRecorder(student)
    with torch.no_grad():
        student(input_ids=batches[0])
        plain = len(graphs)
        with gates:
            for ids in batches:
                student(input_ids=ids)
    torch.testing.assert_close(gates.means(), wanted.means())
    assert plain < len(graphs) <= 2 * plain


def test_the_picture_shows_every_gate_on_a_scale_from_zero_to_one():
    picture = gate_image([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    same = gate_image([[0.5, 0.5]] * 3)
    viridis = {"zero": (68, 1, 84), "one": (253, 231, 37)}
    for corner, colour in viridis.items():
        near = np.abs(picture.astype(int) - colour).max(-1) <= 2
        assert near.mean() > 0.05, corner
        assert near.mean() > 3 * (np.abs(same.astype(int) - colour).max(-1) <= 2).mean()


def test_without_matplotlib_there_is_no_picture_and_no_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert gate_image([[0.5]]) is None
