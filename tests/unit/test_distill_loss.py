"""The fused distillation loss is what float64 autograd makes of its definition: every kind, divergence and option."""

import itertools
import math

import pytest
import torch
from model_support import VOCABULARY, tiny_student, tiny_teacher

from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import AdamW, Distill, Strategy
from xlstm_distill.data.stream import Batch
from xlstm_distill.objectives.distill import DenseTargets, SparseTargets, distillation_loss
from xlstm_distill.objectives.divergence import FLOOR
from xlstm_distill.parallel.strategy import make_strategy
from xlstm_distill.teacher.targets import sparse_targets
from xlstm_distill.train.distill import Distillation

N, HIDDEN, TEACHER_HIDDEN, V, K = 23, 12, 10, 40, 6
KINDS = ("full", "topk_tail", "topk", "random")
DIVERGENCES = ("forward", "reverse", "jsd")
PAIRS = [pair for pair in itertools.product(KINDS, DIVERGENCES) if pair[0] != "random" or pair[1] == "forward"]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 2.0},
    "soft cap": {"soft_cap": 3.0},
    "padding": {"vocabulary": V - 7},
    "all": {"temperature": 0.7, "soft_cap": 3.0, "vocabulary": V - 7},
}


def kl(a, b):
    """Σ a log(a / b) of each row, 0 · log 0 = 0."""
    inside = a > 0
    ratio = torch.where(inside, a, 1.0) / torch.where(inside, b, 1.0)
    return torch.where(inside, a * ratio.log(), 0.0).sum(1)


def between(divergence, teacher, student):
    if divergence == "reverse":
        return kl(student, teacher)
    if divergence == "jsd":
        return (kl(teacher, (teacher + student) / 2) + kl(student, (teacher + student) / 2)) / 2
    return kl(teacher, student)


def masses(logits, temperature, soft_cap, vocabulary):
    """Probabilities, none where a row is padding."""
    capped = soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits
    powers = (capped[:, :vocabulary] / temperature).exp()
    return torch.nn.functional.pad(powers / powers.sum(1, keepdim=True), (0, V - vocabulary))


def plain_loss(
    hidden, head, labels, weights, targets, kind, gamma, beta,
    divergence="forward", temperature=1.0, soft_cap=None, vocabulary=V,
):  # fmt: skip
    """Eq. 13 written down with masses instead of logarithms; gradients by autograd."""
    student = masses(hidden @ head.T, 1.0, soft_cap, vocabulary)
    ce = -student.gather(1, labels[:, None])[:, 0].log()
    student = masses(hidden @ head.T, temperature, soft_cap, vocabulary)
    if kind == "full":
        teacher = masses(targets.hidden @ targets.head_weight.T, temperature, targets.soft_cap, vocabulary)
        return combined(gamma, beta * temperature**2, weights, ce, between(divergence, teacher, student))
    teacher = targets.log_probs.exp() * (targets.ids < vocabulary)
    if kind == "random":
        teacher = teacher / teacher.sum(1, keepdim=True)
        student = student.gather(1, targets.ids)
    elif kind == "topk":
        teacher, student = teacher ** (targets.temperature / temperature), student.gather(1, targets.ids)
        student = student / student.sum(1, keepdim=True)
    else:
        outside = torch.ones_like(student, dtype=torch.bool).scatter(1, targets.ids, False)
        tail = (student * outside).sum(1, keepdim=True)
        teacher = torch.cat([teacher, targets.tail_log_mass.exp()[:, None]], 1)
        student = torch.cat([student.gather(1, targets.ids), tail], 1)
    teacher = teacher / teacher.sum(1, keepdim=True)
    return combined(gamma, beta * temperature**2, weights, ce, between(divergence, teacher, student))


def combined(gamma, beta, weights, ce, values):
    loss = (gamma * ce + beta * values) @ weights
    return loss, ce @ weights, beta * (values @ weights)


def sampled(teacher, teacher_head, draws):
    """Importance-weighted draws, merged by hand: ids [N, draws], log weights with −inf where a row has fewer."""
    drawn = (teacher @ teacher_head.T / 3).softmax(1).multinomial(draws, replacement=True)
    ids, log_weights = torch.zeros_like(drawn), torch.full(drawn.shape, -torch.inf)
    for row, tokens in enumerate(drawn):
        found, counts = tokens.unique(return_counts=True)
        ids[row, : len(found)], log_weights[row, : len(found)] = found, (counts / draws).log()
    return SparseTargets(ids, log_weights, torch.full((len(ids),), -torch.inf))


def problem(kind, top_k=K, seed=0, temperature=1.0, soft_cap=None, vocabulary=V):
    """Targets at the temperature that the loss has (`topk` is brought there by the loss)."""
    torch.manual_seed(seed)
    hidden, head = torch.randn(N, HIDDEN), torch.randn(V, HIDDEN)
    teacher, teacher_head = torch.randn(N, TEACHER_HIDDEN), torch.randn(V, TEACHER_HIDDEN)
    weights = (torch.rand(N) > 0.3).float() / 17
    if kind == "full":
        targets = DenseTargets(teacher, teacher_head, soft_cap)
    else:
        heat = 1.0 if kind == "topk" else temperature
        found = sampled(teacher, teacher_head, 9) if kind == "random" else None
        found = found or SparseTargets(*sparse_targets(teacher / heat, teacher_head, top_k, 8))
        targets = SparseTargets(found.ids, found.log_probs, found.tail_log_mass, heat)
    return hidden, head, torch.randint(0, vocabulary, (N,)), weights, targets


def widened(targets):
    return type(targets)(
        *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in vars(targets).values())
    )


def distance(found, wanted):
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def assert_equal_to_plain(kind, given, gamma=0.9, beta=0.1, chunk=256, bound=1e-5, wide=False, **options):
    hidden, head, labels, weights, targets = given
    like = torch.float64 if wide else torch.float32
    a, b = (x.to(like, copy=True).requires_grad_() for x in (hidden, head))
    own = widened(targets) if wide else targets
    found = distillation_loss(
        a, b, labels, weights.to(like), own, kind=kind, gamma=gamma, beta=beta, chunk=chunk, **options
    )
    found.loss.backward()
    c, d = hidden.double().requires_grad_(), head.double().requires_grad_()
    loss, ce, value = plain_loss(c, d, labels, weights.double(), widened(targets), kind, gamma, beta, **options)
    loss.backward()
    for x, y in ((found.loss, loss), (found.ce, ce), (beta * found.kl, value), (a.grad, c.grad), (b.grad, d.grad)):
        assert distance(x, y) <= bound


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("kind", "divergence"), PAIRS)
def test_value_and_gradients_are_those_of_autograd(kind, divergence, option):
    options = OPTIONS[option]
    given = problem(kind, **options)
    for gamma, beta in ((0.9, 0.1), (0.0, 1.0)):
        assert_equal_to_plain(kind, given, gamma, beta, divergence=divergence, **options)
        assert_equal_to_plain(kind, given, gamma, beta, divergence=divergence, wide=True, bound=1e-11, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 5, 23, 256])
def test_the_chunk_changes_nothing(kind, chunk):
    assert_equal_to_plain(kind, problem(kind), chunk=chunk)


@pytest.mark.parametrize("kind", KINDS)
def test_nor_do_the_blocks_in_which_a_chunk_is_worked_on(kind, monkeypatch):
    monkeypatch.setattr("xlstm_distill.objectives.terms.BLOCK", {"cpu": 3 * V})
    options = OPTIONS["all"]
    assert_equal_to_plain(kind, problem(kind, **options), chunk=7, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gamma", "beta"), [(1.0, 0.0), (0.3, 2.0)])
def test_other_weights_of_the_terms(kind, gamma, beta):
    assert_equal_to_plain(kind, problem(kind), gamma, beta)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["topk_tail", "topk"])
@pytest.mark.parametrize("top_k", [1, V - 1, V])
def test_one_outcome_and_the_whole_vocabulary(kind, top_k, divergence):
    assert_equal_to_plain(kind, problem(kind, top_k), divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_the_whole_vocabulary_all_kinds_are_the_full_divergence(divergence):
    hidden, head, labels, weights, dense = problem("full")
    sparse = SparseTargets(*sparse_targets(dense.hidden, dense.head_weight, V, 8))
    settings = {"gamma": 0.9, "beta": 0.1, "divergence": divergence}
    wanted = distillation_loss(hidden, head, labels, weights, dense, kind="full", **settings)
    for kind in ("topk", "topk_tail"):
        found = distillation_loss(hidden, head, labels, weights, sparse, kind=kind, **settings)
        torch.testing.assert_close(found.kl, wanted.kl, atol=1e-6, rtol=1e-5)


def test_the_mean_gradient_of_sampled_targets_is_the_full_one():
    """One draw, every outcome of it once, weighted by its probability: the expectation itself."""
    torch.manual_seed(0)
    hidden, head, teacher, teacher_head = (torch.randn(*s) for s in ((1, HIDDEN), (V, HIDDEN), (1, 10), (V, 10)))
    chances = (teacher @ teacher_head.T).softmax(1)[0]
    each = SparseTargets(torch.arange(V)[:, None], torch.zeros(V, 1), torch.full((V,), -torch.inf))
    cases = {
        "random": (hidden.expand(V, -1), torch.zeros(V, dtype=torch.int64), chances, each),
        "full": (hidden, torch.zeros(1, dtype=torch.int64), torch.ones(1), DenseTargets(teacher, teacher_head)),
    }
    grads = {}
    for kind, (rows, labels, weights, targets) in cases.items():
        weight = head.clone().requires_grad_()
        loss = distillation_loss(rows, weight, labels, weights, targets, kind=kind, gamma=0.0, beta=1.0).loss
        (grads[kind],) = torch.autograd.grad(loss, weight)
    assert distance(grads["random"], grads["full"].double()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_padding_rows_of_the_head_get_no_gradient_and_no_probability_whatever_stands_there(kind):
    vocabulary = OPTIONS["padding"]["vocabulary"]
    hidden, head, labels, weights, targets = problem(kind, **OPTIONS["padding"])
    found = []
    for fill in (0.0, 50.0):
        own = head.clone()
        own[vocabulary:] = fill
        own.requires_grad_()
        settings = {"kind": kind, "gamma": 0.9, "beta": 0.1, "vocabulary": vocabulary}
        loss = distillation_loss(hidden, own, labels, weights, targets, **settings).loss
        loss.backward()
        assert own.grad[vocabulary:].eq(0).all()
        found.append((loss, own.grad))
    torch.testing.assert_close(*found, atol=0, rtol=0)


def test_rows_that_a_dense_teacher_does_not_have_are_padding():
    hidden, head, labels, weights, dense = problem("full", vocabulary=V - 7)
    smaller = DenseTargets(dense.hidden, dense.head_weight[: V - 7])
    settings = {"kind": "full", "gamma": 0.9, "beta": 0.1}
    wanted = distillation_loss(hidden, head, labels, weights, dense, vocabulary=V - 7, **settings)
    assert distillation_loss(hidden, head, labels, weights, smaller, **settings) == wanted
    with pytest.raises(ValueError, match="the student's head has 30 rows, the teacher's 40"):
        distillation_loss(hidden, head[:30], labels.clamp_max(29), weights, dense, **settings)


@pytest.mark.parametrize(("kind", "divergence"), [pair for pair in PAIRS if pair[0] != "full"])
def test_places_without_mass_count_for_nothing_wherever_they_stand_and_whatever_id_they_hold(kind, divergence):
    hidden, head, labels, weights, targets = problem("topk_tail")
    ids = torch.cat([torch.zeros(N, 2, dtype=torch.int64), targets.ids, targets.ids[:, :2]], 1)
    log_probs = torch.nn.functional.pad(targets.log_probs, (2, 2), value=-torch.inf)
    found = {}
    for name, own in {"short": targets, "long": SparseTargets(ids, log_probs, targets.tail_log_mass)}.items():
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = distillation_loss(
            x, w, labels, weights, own, kind=kind, gamma=0.9, beta=0.5, divergence=divergence, chunk=7
        )
        loss.loss.backward()
        found[name] = (loss.ce, loss.kl, x.grad, w.grad)
    torch.testing.assert_close(found["long"], found["short"], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_is_the_student_costs_nothing(divergence):
    hidden, head, labels, weights, _ = problem("full")
    x = hidden.clone().requires_grad_()
    targets = SparseTargets(*sparse_targets(hidden, head, K, 8))
    loss = distillation_loss(
        x, head, labels, weights, targets, kind="topk_tail", gamma=0.0, beta=1.0, divergence=divergence
    )
    loss.loss.backward()
    assert abs(float(loss.kl)) < 1e-6
    assert x.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_count_for_nothing_whatever_stands_there(kind):
    hidden, head, labels, weights, targets = problem(kind)
    assert (weights == 0).any()
    x = hidden.clone().requires_grad_()
    settings = {"kind": kind, "gamma": 0.9, "beta": 0.1, "vocabulary": V - 2}
    labels = labels.clamp_max(V - 3)
    before = distillation_loss(x, head, labels, weights, targets, **settings)
    before.loss.backward()
    assert x.grad[weights == 0].eq(0).all()
    other = torch.where(weights == 0, V - 1, labels)  # padding: its cross-entropy is infinite
    torch.testing.assert_close(distillation_loss(x, head, other, weights, targets, **settings).loss, before.loss)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_confident_teacher_and_a_confident_student_stay_finite(divergence):
    hidden, head, labels, weights, _ = problem("topk_tail")
    x = (120 * hidden).requires_grad_()
    targets = SparseTargets(*sparse_targets(160 * hidden.flip(0), head, K, 8))
    assert targets.tail_log_mass.min() < FLOOR
    for kind in ("topk_tail", "topk"):
        x.grad = None
        loss = distillation_loss(
            x, head, labels, weights, targets, kind=kind, gamma=0.9, beta=0.1, divergence=divergence
        )
        loss.loss.backward()
        assert loss.loss.isfinite()
        assert x.grad.isfinite().all()


def test_a_tail_below_float32s_rounding_still_has_its_gradient():
    """Of a student whose top is all but certain: q_j (1 − P_tail / Q_tail) is −r_j P_tail, not 0."""
    head, hidden = torch.tensor([[60.0], [0.0], [0.0]]), torch.ones(1, 1)
    targets = SparseTargets(torch.tensor([[0]]), torch.tensor([0.5]).log()[None], torch.tensor([0.5]).log())
    weight = head.clone().requires_grad_()
    loss = distillation_loss(
        hidden, weight, torch.tensor([0]), torch.ones(1), targets, kind="topk_tail", gamma=0.0, beta=1.0
    )
    loss.loss.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[0.5], [-0.25], [-0.25]]))
    assert float(loss.kl) == pytest.approx(30 - 1.5 * math.log(2), rel=1e-5)


BAD = [
    ("full", "topk", {}, TypeError, "do not go together"),
    ("topk", "full", {}, TypeError, "do not go together"),
    ("random", "full", {}, TypeError, "do not go together"),
    ("topk_tail", "topk_tail", {"temperature": 2.0}, ValueError, "temperature 2: the targets were made at 1"),
    ("random", "random", {"temperature": 2.0}, ValueError, "temperature 2: the targets were made at 1"),
    ("random", "random", {"divergence": "jsd"}, ValueError, "an estimate of the forward KL only"),
]


@pytest.mark.parametrize(("kind", "given", "options", "error", "message"), BAD)
def test_what_does_not_go_together_is_refused(kind, given, options, error, message):
    with pytest.raises(error, match=message):
        distillation_loss(*problem(given), kind=kind, gamma=1.0, beta=1.0, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_sides_get_no_gradient_and_a_validation_makes_none(kind):
    hidden, head, labels, weights, targets = problem(kind)
    x, settings = hidden.clone().requires_grad_(), {"kind": kind, "gamma": 1.0, "beta": 1.0}
    loss = distillation_loss(x, head, labels, weights, targets, **settings)
    loss.loss.backward()
    assert x.grad is not None
    assert head.grad is None
    with torch.no_grad():
        assert distillation_loss(x, head.requires_grad_(), labels, weights, targets, **settings).loss == loss.loss


def test_the_gradient_is_scaled_by_what_follows_and_handed_out_once():
    grads = []
    for factor in (1.0, 0.25):
        hidden, head, labels, weights, targets = problem("topk_tail")
        inputs = [hidden.requires_grad_(), head.requires_grad_()]
        loss = distillation_loss(hidden, head, labels, weights, targets, kind="topk_tail", gamma=1.0, beta=1.0).loss
        grads.append(torch.autograd.grad(factor * loss, inputs, retain_graph=True))
        with pytest.raises(RuntimeError, match="has one backward pass"):
            loss.backward()
    torch.testing.assert_close([x / 4 for x in grads[0]], list(grads[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_by_autocast_are_near_and_keep_the_dtypes(kind):
    hidden, head, labels, weights, targets = problem(kind)
    found = {}
    for enabled in (False, True):
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = distillation_loss(x, w, labels, weights, targets, kind=kind, gamma=0.9, beta=0.1)
        loss.loss.backward()
        assert {t.dtype for t in (*loss, x.grad, w.grad)} == {torch.float32}
        found[enabled] = (x.grad, w.grad)
    for near, exact in zip(found[True], found[False], strict=True):
        assert 1e-6 < distance(near, exact.double()) < 3e-2
    x, w = hidden.bfloat16().requires_grad_(), head.bfloat16().requires_grad_()
    distillation_loss(x, w, labels, weights, targets, kind=kind, gamma=0.9, beta=0.1).loss.backward()
    assert x.grad.dtype == w.grad.dtype == torch.bfloat16
    assert distance(w.grad, found[False][1].double()) < 3e-2


def test_the_students_loss_is_that_of_its_own_logits_capped_and_without_padding(tmp_path):
    """Tied embeddings with more rows than the teacher's, under the task that trains them."""
    teacher, student = tiny_student(tmp_path, teacher=tiny_teacher(tie_word_embeddings=True))
    student.resize_token_embeddings(VOCABULARY + 7)
    student.config.base.final_logit_softcapping = 3.0
    tokens = torch.randint(3, VOCABULARY, (2, 9))
    batch = Batch(tokens, torch.ones_like(tokens).bool(), torch.zeros_like(tokens))
    strategy = make_strategy(Strategy(precision="float32", threads=1), World())
    hidden = teacher.model(tokens[:, :-1]).last_hidden_state.flatten(0, 1).detach()
    targets = SparseTargets(*sparse_targets(hidden, teacher.lm_head.weight.detach(), K, 8))
    settings = Distill(loss="topk_tail", divergence="reverse", gamma=1.0, beta=0.5, mixer_lr=1e-3)
    task = Distillation(student, lambda _: targets, settings, AdamW(), strategy, {}, VOCABULARY)
    found = task._forward(batch, torch.tensor(16.0), True)
    found.loss.backward()
    grad = student.lm_head.weight.grad.clone()
    student.zero_grad()
    logits = student(tokens[:, :-1]).logits.flatten(0, 1)
    assert logits.abs().max() < 3
    log_probs, labels = logits[:, :VOCABULARY].log_softmax(-1), tokens[:, 1:].flatten()
    ce = -log_probs.gather(1, labels[:, None]).mean()
    probs = log_probs.exp()
    outside = torch.ones_like(probs, dtype=torch.bool).scatter(1, targets.ids, False)
    mine = torch.cat([probs.gather(1, targets.ids), (probs * outside).sum(1, keepdim=True)], 1)
    theirs = torch.cat([targets.log_probs, targets.tail_log_mass[:, None]], 1).exp()
    loss = ce + 0.5 * kl(mine, theirs).mean()
    loss.backward()
    torch.testing.assert_close(found.loss, loss, atol=1e-5, rtol=1e-5)
    assert distance(grad, student.lm_head.weight.grad.double()) < 1e-4
    assert student.lm_head.weight is student.model.embed_tokens.weight
