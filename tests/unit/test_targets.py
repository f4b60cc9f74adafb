"""Sparse targets are the teacher's log-probabilities and the log of what is left."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from data_support import make_config, make_job, make_shards
from model_support import VOCABULARY, tiny_teacher

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import Cache, Distill, Strategy
from xlstm_distill.data.stream import Batch
from xlstm_distill.objectives.distill import DenseTargets, distillation_loss
from xlstm_distill.parallel.strategy import make_strategy
from xlstm_distill.teacher.index import data_digest, index_of, write_note
from xlstm_distill.teacher.targets import OnlineTargets, cached_targets, make_target_source, sparse_targets


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("top_k", [1, 5, 29, 30])
def test_they_are_the_softmax_at_temperature_one_in_falling_order(top_k, chunk):
    torch.manual_seed(0)
    hidden, head = torch.randn(20, 8), torch.randn(30, 8)
    ids, log_probs, tail = sparse_targets(hidden, head, top_k, chunk)
    reference = (hidden.double() @ head.double().T).log_softmax(-1)
    assert ids.equal(reference.topk(top_k).indices)
    torch.testing.assert_close(log_probs.double(), reference.topk(top_k).values, atol=1e-5, rtol=1e-5)
    rest = torch.ones(20, 30, dtype=torch.bool).scatter(1, ids, False)
    wanted = reference.masked_fill(~rest, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(tail.double(), wanted, atol=1e-5, rtol=1e-5)
    assert (top_k == 30) == bool(tail.isinf().all())


def test_a_tail_far_below_float32s_rounding_is_not_lost():
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[60.0], [0.0], [0.0]])
    _, log_probs, tail = sparse_targets(hidden, head, 1, 4)
    assert float(log_probs) == 0.0
    assert float(tail) == pytest.approx(-60 + torch.log(torch.tensor(2.0)).item(), abs=1e-5)


def batch(count=3, length=10):
    tokens = torch.randint(3, VOCABULARY, (count, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, torch.ones_like(tokens).bool(), torch.zeros_like(tokens))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", ["full", "topk", "topk_tail"])
def test_the_teacher_beside_the_student_gives_its_own_logits(tmp_path, loss, tied):
    teacher = tiny_teacher(tie_word_embeddings=tied)
    teacher.save_pretrained(tmp_path)
    strategy = make_strategy(Strategy(precision="float32", threads=1), World())
    online = OnlineTargets(tmp_path, Distill(loss=loss, targets="online"), 5, strategy)
    given = batch()
    with torch.no_grad():
        wanted = teacher(given.tokens[:, :-1]).logits.flatten(0, 1).log_softmax(-1)
    found = online(given)
    if loss == "full":
        assert isinstance(found, DenseTargets)
        torch.testing.assert_close((found.hidden @ found.head_weight.T).log_softmax(-1), wanted, atol=1e-4, rtol=1e-4)
    else:
        assert found.ids.shape == (30, 5)
        torch.testing.assert_close(found.log_probs, wanted.topk(5).values, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in online.teacher.model.parameters())
    assert not online.teacher.model.lm_head._forward_pre_hooks


def test_with_reset_the_teacher_sees_each_document_of_a_sample_alone(tmp_path):
    teacher = tiny_teacher()
    teacher.save_pretrained(tmp_path)
    strategy = make_strategy(Strategy(precision="float32", threads=1), World())
    online = OnlineTargets(tmp_path, Distill(loss="full", targets="online"), 5, strategy, split=True)
    given = batch()
    given.document[:, 4:] = 1
    found = online(given).hidden.unflatten(0, (3, 10))
    with torch.no_grad():
        alone = [teacher.model(part).last_hidden_state for part in (given.tokens[:, :4], given.tokens[:, 4:-1])]
    torch.testing.assert_close(found, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)


def test_cached_targets_come_flat_and_their_absence_is_told():
    given = batch()
    with pytest.raises(Mistake, match="hold no teacher targets; run stage=cache"):
        cached_targets(given)
    given.targets = (torch.zeros(3, 10, 4).long(), torch.zeros(3, 10, 4), torch.zeros(3, 10))
    found = cached_targets(given)
    assert [tuple(x.shape) for x in (found.ids, found.log_probs, found.tail_log_mass)] == [(30, 4), (30, 4), (30,)]
    assert found.temperature == 1


@pytest.mark.parametrize("loss", ["full", "topk", "topk_tail"])
def test_at_a_temperature_the_teacher_beside_the_student_is_softer(tmp_path, loss):
    """And the loss of a student that is the teacher is the same 0 whatever the kind."""
    teacher = tiny_teacher()
    teacher.save_pretrained(tmp_path)
    strategy = make_strategy(Strategy(precision="float32", threads=1), World())
    online = OnlineTargets(tmp_path, Distill(loss=loss, targets="online", temperature=2.0), 5, strategy)
    given = batch()
    with torch.no_grad():
        hidden = teacher.model(given.tokens[:, :-1]).last_hidden_state.flatten(0, 1)
    found, head, labels = online(given), teacher.lm_head.weight.detach(), given.tokens[:, 1:].flatten()
    if loss != "full":
        wanted = (hidden @ head.T / 2).log_softmax(-1).topk(5).values
        torch.testing.assert_close(found.log_probs, wanted, atol=1e-4, rtol=1e-4)
    settings = {"kind": loss, "gamma": 0.0, "beta": 1.0, "temperature": 2.0}
    loss_of_itself = distillation_loss(hidden, head, labels, torch.ones(30), found, **settings)
    assert abs(float(loss_of_itself.kl)) < 1e-3
    with pytest.raises(ValueError, match="temperature 1") if loss == "topk_tail" else nullcontext():
        distillation_loss(hidden, head, labels, torch.ones(30), found, **settings | {"temperature": 1.0})


@pytest.mark.parametrize("loss", ["topk_tail", "random"])
def test_a_temperature_over_cached_targets_is_refused_before_anything_is_read(tmp_path, loss):
    config = replace(make_config(), distill=Distill(loss=loss, temperature=2.0))
    job = make_job(tmp_path, "distill", config)
    with pytest.raises(Mistake, match=r"distill.temperature=2.0: the mass that cached targets leave out is known at 1"):
        make_target_source(config, job, make_strategy(Strategy(threads=1), World()), tmp_path / "shards", ["mine"])


@pytest.mark.parametrize(
    ("loss", "sampler"), [("topk_tail", "hybrid"), ("topk", "random"), ("random", "topk"), ("topk", "hybrid")]
)
def test_a_loss_that_cannot_read_what_the_sampler_kept_is_refused(tmp_path, loss, sampler):
    config = replace(make_config(), distill=Distill(loss=loss), cache=Cache(sampler=sampler))
    job = make_job(tmp_path, "distill", config)
    with pytest.raises(Mistake, match=rf"distill.loss={loss}: reads targets of cache.sampler=.*, got {sampler}"):
        make_target_source(config, job, make_strategy(Strategy(threads=1), World()), tmp_path / "shards", ["mine"])


def test_targets_of_another_teacher_or_of_other_tokens_are_refused_before_anything_is_loaded(tmp_path):
    config = make_config()
    fetched = make_job(tmp_path, "fetch", config)
    (fetched.output / "teacher.json").write_text(json.dumps({"weights": "aa", "tokenizer": "bb"}))
    job = make_job(tmp_path, "distill", config)
    right = index_of(config, fetched.output)
    tokens = make_job(tmp_path, "tokenize", config).output / "mine"
    for split in ("train", "validation"):
        make_shards(tokens / split, 2)

    digests = {split: data_digest(tokens / split) for split in ("train", "validation")}

    def sources(**changes):
        for split, digest in digests.items():
            write_note(tmp_path / "shards/mine" / split, {**right, "data": digest, **changes})
        strategy = make_strategy(Strategy(threads=1), World())
        return make_target_source(config, job, strategy, tmp_path / "shards", ["mine"])

    assert sources() is cached_targets
    with pytest.raises(Mistake, match="made with weights=zz, this run has weights=aa"):
        sources(weights="zz")
    with pytest.raises(Mistake, match=f"made with data=zz, this run has data={digests['train']}"):
        sources(data="zz")
    for file in tokens.glob("*/index.json"):  # the targets' shards hold the tokens themselves
        file.unlink()
    assert sources(data="zz") is cached_targets
