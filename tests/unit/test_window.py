"""Window and sinks are one masked softmax over the whole sequence, whatever the blocks in which it is computed."""

import pytest
import torch

from xlstm_distill.model.layout import make_layout
from xlstm_distill.model.window import window_attention

B, H, D = 2, 2, 8


def reference(query, key, value, window, sinks, first=0):
    """Float64, one query after the other; positions before `first` are padding."""
    out = torch.zeros_like(value)
    for t in range(first, query.shape[2]):
        seen = [s for s in range(first, t + 1) if t - s < window or s - first < sinks]
        scores = torch.einsum("bhd,bhsd->bhs", query[:, :, t], key[:, :, seen]) / query.shape[-1] ** 0.5
        out[:, :, t] = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), value[:, :, seen])
    return out


def draw(length, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(B, H, length, D, dtype=torch.float64) for _ in range(3)]


def attend(query, key, value, window, sinks, mask=None, documents=None):
    layout = make_layout(mask, documents, query.shape[2])
    return window_attention(query, key, value, window, sinks, layout)


def with_gradients(function, tensors, dtype, *settings):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = function(*leaves, *settings)
    torch.manual_seed(1)
    (out * torch.randn(out.shape, dtype=torch.float64).to(dtype)).sum().backward()
    return [out, *(x.grad for x in leaves)]


@pytest.mark.parametrize(("window", "sinks"), [(16, 4), (16, 0), (1, 0), (1, 3), (5, 40), (200, 4)])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 150])
def test_output_and_gradients_are_those_of_the_masked_softmax(length, window, sinks):
    tensors = draw(length)
    found = with_gradients(attend, tensors, torch.float32, window, sinks)
    wanted = with_gradients(reference, tensors, torch.float64, window, sinks)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_window_and_sinks_that_reach_everything_are_full_causal_attention():
    query, key, value = (x.float() for x in draw(40))
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(attend(query, key, value, 36, 4), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", [1, 7, 30])
def test_left_padded_rows_equal_what_they_give_alone(pad):
    query, key, value = (x.float() for x in draw(100))
    mask = torch.ones(B, 100, dtype=torch.long)
    mask[1, :pad] = 0
    together = attend(query, key, value, 16, 4, mask)
    alone = attend(*(x[1:, :, pad:] for x in (query, key, value)), 16, 4)
    torch.testing.assert_close(together[1:, :, pad:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[:1], attend(query[:1], key[:1], value[:1], 16, 4), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(together).all()


