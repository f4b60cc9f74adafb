"""Held-out numbers against whole logits in float64."""

import pytest
import torch
from eval_support import samples, tiny_llama

from xlstm_distill.evaluate import heldout
from xlstm_distill.evaluate.heldout import (
    Reference,
    Sample,
    by_position,
    final_hidden,
    load_hidden,
    measure,
    save_hidden,
)


@pytest.fixture(scope="module")
def models():
    return tiny_llama(0), tiny_llama(1)


def both(models, sample, window=0):
    teacher, student = models
    tokens = sample.tokens[:, :-1]
    reference = Reference(final_hidden(teacher, tokens, 3), teacher.lm_head.weight.detach())
    return measure(final_hidden(student, tokens, 3), student.lm_head.weight.detach(), sample, reference, window)


def whole_logits(model, tokens):
    with torch.no_grad():
        return model(tokens[:, :-1]).logits.double().log_softmax(-1)


def test_chunked_numbers_equal_those_of_whole_logits(models, monkeypatch):
    monkeypatch.setattr(heldout, "CHUNK", 7)
    batch = samples()
    batch.mask[0, :50] = False
    numbers = both(models, Sample(batch.tokens, batch.mask), window=16)
    t, s = (whole_logits(model, batch.tokens) for model in models)
    valid = batch.mask[:, 1:]
    kl = (t.exp() * (t - s)).sum(-1)
    ce = -s.gather(2, batch.tokens[:, 1:, None]).squeeze(2)
    assert numbers["tokens"] == int(valid.sum())
    assert numbers["kl"] == pytest.approx(kl[valid].mean().item(), rel=1e-5)
    assert numbers["ce"] == pytest.approx(ce[valid].mean().item(), rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(ce[valid].mean().exp().item(), rel=1e-5)
    assert numbers["agreement"] == pytest.approx((t.argmax(-1) == s.argmax(-1))[valid].double().mean().item())
    beyond = torch.arange(valid.shape[1]) >= 16
    assert numbers["kl_beyond_window"] == pytest.approx(kl[valid & beyond].mean().item(), rel=1e-5)
    assert numbers["kl_within_window"] == pytest.approx(kl[valid & ~beyond].mean().item(), rel=1e-5)
    first = kl[:, :64][valid[:, :64]].mean().item()
    assert numbers["positions"]["kl"][0] == pytest.approx(first, rel=1e-5)


def test_a_model_stands_at_zero_from_itself(models):
    numbers = both((models[0], models[0]), Sample(samples().tokens, samples().mask))
    assert numbers["kl"] < 1e-6
    assert numbers["agreement"] == 1


def test_the_teacher_needs_no_reference(models):
    batch = samples()
    hidden = final_hidden(models[0], batch.tokens[:, :-1], 2)
    numbers = measure(hidden, models[0].lm_head.weight.detach(), Sample(batch.tokens, batch.mask), None)
    assert (numbers["kl"], numbers["agreement"]) == (0, 1)
    assert "kl_within_window" not in numbers


def test_the_size_of_a_batch_changes_nothing(models):
    tokens = samples().tokens[:, :-1]
    torch.testing.assert_close(final_hidden(models[0], tokens, 1), final_hidden(models[0], tokens, 4))


def test_a_bucket_without_a_label_has_no_mean():
    where = torch.tensor([0, 1, 130])
    curve = by_position(where, torch.tensor([1.0, 3.0, 5.0]).double(), torch.zeros(3).double(), 192)
    assert curve == {"bucket": 64, "kl": [0.0, None, 0.0], "ce": [2.0, None, 5.0]}


def test_long_sequences_get_wider_buckets():
    where = torch.arange(4096)
    curve = by_position(where, where.double(), where.double(), 4096)
    assert curve["bucket"] == 128
    assert len(curve["kl"]) == 32


def test_hidden_states_come_back_only_for_what_they_were_made_from(tmp_path):
    hidden = torch.randn(2, 3, 4)
    save_hidden(tmp_path / "h.safetensors", hidden, "key")
    assert torch.equal(load_hidden(tmp_path / "h.safetensors", "key"), hidden)
    assert load_hidden(tmp_path / "h.safetensors", "other") is None
    assert load_hidden(tmp_path / "none.safetensors", "key") is None
