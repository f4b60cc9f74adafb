"""What is drawn from the teacher has the teacher as its mean, and depends on the sample alone."""

import pytest
import torch

from xlstm_distill.objectives.distill import DenseTargets, SparseTargets, distillation_loss
from xlstm_distill.teacher.samplers import draws_of, sparse_targets, uniforms

V, H, K = 40, 8, 6


def model(seed=0, rows=3, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, H, generator=generator), torch.randn(V, H, generator=generator)


def drawn(hidden, head, sampler, top_k=K, chunk=7, repeats=1, seed=0, **more):
    rows = hidden.repeat(repeats, 1)
    draws = uniforms(len(rows), draws_of(sampler, top_k), seed)
    return sparse_targets(rows, head, top_k, chunk, sampler=sampler, draws=draws, **more)


def dense(ids, log_weights):
    return torch.zeros(len(ids), V).scatter_add_(1, ids, log_weights.exp())


@pytest.mark.parametrize("sampler", ["random", "hybrid"])
def test_weights_sum_to_one_fall_and_nothing_is_left_out(sampler):
    hidden, head = model(rows=20)
    ids, log_weights, tail = drawn(hidden, head, sampler)
    assert ids.shape == log_weights.shape == (20, K)
    torch.testing.assert_close(log_weights.exp().sum(1), torch.ones(20))
    assert (log_weights[:, 1:] <= log_weights[:, :-1]).all()
    assert tail.isinf().all()
    for row, weights in zip(ids.tolist(), log_weights.tolist(), strict=True):
        real = [token for token, weight in zip(row, weights, strict=True) if weight > -torch.inf]
        assert len(set(real)) == len(real)


@pytest.mark.parametrize("sampler", ["random", "hybrid"])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_their_mean_is_the_teachers_distribution(sampler, soft_cap):
    hidden, head = model()
    repeats = 20_000
    ids, log_weights, _ = drawn(hidden, head, sampler, chunk=4096, repeats=repeats, soft_cap=soft_cap)
    mean = dense(ids, log_weights).unflatten(0, (repeats, 3)).mean(0)
    logits = hidden @ head.T
    wanted = (soft_cap * (logits / soft_cap).tanh() if soft_cap else logits).softmax(-1)
    bound = 5 * (wanted / K * 2 / repeats).sqrt() + 1e-4  # five standard errors
    assert ((mean - wanted).abs() < bound).all()


def test_the_head_of_hybrid_is_exact_and_its_tail_has_the_rest_of_the_mass():
    hidden, head = model(rows=20)
    ids, log_weights, _ = drawn(hidden, head, "hybrid")
    reference = (hidden @ head.T).log_softmax(-1)
    wanted = torch.zeros(20, V).scatter_(1, *(reference.exp().topk(K - K // 2)[::-1]))
    top = wanted > 0
    torch.testing.assert_close(dense(ids, log_weights)[top], wanted[top])


def test_its_weights_vary_less_than_those_of_random():
    hidden, head = model()
    spread = {}
    for sampler in ("random", "hybrid"):
        ids, log_weights, _ = drawn(hidden, head, sampler, chunk=4096, repeats=2000)
        spread[sampler] = float(dense(ids, log_weights).unflatten(0, (2000, 3)).var(0).sum())
    assert spread["hybrid"] < 0.5 * spread["random"]


def test_the_gradient_of_the_loss_has_the_full_kls_as_its_mean():
    (teacher, head), (student, own) = model(rows=1), model(seed=1, rows=1)
    repeats = 4000

    def gradient(targets, kind, rows):
        hidden = student.repeat(rows, 1).requires_grad_()
        labels, weights = torch.zeros(rows, dtype=torch.long), torch.ones(rows)
        distillation_loss(hidden, own, labels, weights, targets, kind=kind, gamma=0.0, beta=1.0).loss.backward()
        return hidden.grad.mean(0)

    wanted = gradient(DenseTargets(teacher, head), "full", 1)
    for sampler in ("random", "hybrid"):
        targets = SparseTargets(*drawn(teacher, head, sampler, chunk=4096, repeats=repeats))
        found = gradient(targets, "random", repeats)
        assert float((found - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("sampler", ["random", "hybrid"])
def test_they_depend_on_the_key_alone_and_not_on_chunks(sampler):
    hidden, head = model(rows=20)
    first = drawn(hidden, head, sampler, chunk=3)
    again = drawn(hidden, head, sampler, chunk=20)
    assert first[0].equal(again[0])
    torch.testing.assert_close(first[1], again[1])
    assert not torch.equal(first[0], drawn(hidden, head, sampler, chunk=3, seed=1)[0])
    assert uniforms(2, 3, 0, "math", "train", 7).equal(uniforms(2, 3, 0, "math", "train", 7))
    assert not uniforms(2, 3, 0, "math", "train", 7).equal(uniforms(2, 3, 0, "math", "train", 8))
    assert not uniforms(2, 3, 0, "math", "train", 7).equal(uniforms(2, 3, 0, "code", "train", 7))


@pytest.mark.parametrize("sampler", ["random", "hybrid"])
def test_a_token_without_mass_is_never_drawn_and_a_tail_without_mass_gives_nothing(sampler):
    hidden, head = model(rows=50, scale=1000.0)  # one token has it all
    ids, log_weights, _ = drawn(hidden, head, sampler)
    best = (hidden @ head.T).argmax(-1)
    assert ids[:, 0].equal(best)
    assert (log_weights[:, 0] > -1e-3).all()
    assert not log_weights.isnan().any()
    everything = drawn(hidden, head, "hybrid", top_k=2 * V)  # its head is the vocabulary
    assert not everything[1].isnan().any()
    assert everything[1][:, V:].isinf().all()
