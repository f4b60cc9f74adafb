"""Window and sinks are one masked softmax over the whole sequence, whatever the blocks in which it is computed."""

import pytest
import torch

from xlstm_distill.model.layout import DOCUMENT, make_layout
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


def assert_alike(found, wanted, tensors, *settings):
    """Output and gradients of `found` in float32 are finite and those of `wanted` in float64."""
    ours = with_gradients(found, tensors, torch.float32, *settings)
    theirs = with_gradients(wanted, tensors, torch.float64, *settings)
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(16, 4), (16, 0), (1, 0), (1, 3), (5, 40), (200, 4)])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 150])
def test_output_and_gradients_are_those_of_the_masked_softmax(length, window, sinks):
    assert_alike(attend, reference, draw(length), window, sinks)


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


@pytest.mark.parametrize(("window", "sinks"), [(64, 4), (1, 1), (65, 2), (63, 0), (3, 70)])
@pytest.mark.parametrize("length", [63, 64, 65, 66, 129, 200])
def test_around_the_edges_of_blocks(length, window, sinks):
    assert_alike(attend, masked, draw(length), window, sinks)


def masked(query, key, value, window, sinks, layout=None):
    """One softmax under `allowed`, float64."""
    length = query.shape[2]
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~allowed(length, window, sinks, layout)[:, None], -torch.inf).softmax(-1) @ value


def allowed(length, window, sinks, layout=None):
    """Which key a query sees [B, T, T], by a loop over pairs; padding sees itself."""
    rows = layout.position.tolist() if layout else [list(range(length))]
    seen = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for row, positions in enumerate(rows):
        for q, here in enumerate(positions):
            for k, there in enumerate(positions):
                if here < 0 or there < 0:
                    seen[row, q, k] = q == k
                    continue
                (document, at), (other, of) = divmod(here, DOCUMENT), divmod(there, DOCUMENT)
                seen[row, q, k] = document == other and of <= at and (at - of < window or of < sinks)
    return seen


def layouts():
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :6] = mask[1, 33:] = 0
    documents = torch.cat([torch.full((n,), n) for n in (1, 2, 17, 12, 8)]).expand(2, -1)
    return {
        "padding": make_layout(mask, None, 40),
        "documents": make_layout(None, documents, 40),
        "one row of documents": make_layout(None, documents[:1], 40),
        "both": make_layout(mask, documents, 40),
    }


@pytest.mark.parametrize("kind", ["padding", "documents", "one row of documents", "both"])
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (1, 3), (9, 0), (50, 2)])
def test_padding_and_documents_output_and_gradients(kind, window, sinks):
    layout, tensors = layouts()[kind], draw(40)
    real = layout.real.expand(B, -1)[:, None, :, None]

    def found(query, key, value):
        return window_attention(query, key, value, window, sinks, layout) * real

    def wanted(query, key, value):
        return masked(query, key, value, window, sinks, layout) * real

    assert_alike(found, wanted, tensors)


@pytest.mark.parametrize("kind", [None, "padding", "documents", "both"])
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (1, 3), (9, 0), (50, 2)])
def test_the_mask_of_flex_attention_is_the_same(kind, window, sinks):
    from xlstm_distill.model import flex

    layout = layouts()[kind] if kind else None
    mask = (
        flex.window_mask(layout.position, window, sinks)
        if kind
        else flex._plain_mask(40, window, sinks, torch.device("cpu"))
    )
    pairs = torch.arange(40)
    wanted = allowed(40, window, sinks, layout)
    for row in range(len(wanted)):
        found = mask.mask_mod(torch.tensor(row), torch.tensor(0), pairs[:, None], pairs[None, :])
        assert found.expand(40, 40).equal(wanted[row])


@pytest.mark.parametrize("kind", ["plain", "padding", "documents", "both"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 3), (64, 4), (129, 0), (512, 4), (5000, 2)])
def test_the_blocks_that_flex_attention_visits_hold_every_pair_that_is_seen(kind, window, sinks):
    from torch.nn.attention.flex_attention import create_block_mask

    from xlstm_distill.model import flex

    length = 1000
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :300] = mask[1, 850:] = 0
    documents = (torch.arange(length) // 210)[None].expand(2, -1)
    layout = make_layout(None if kind == "documents" else mask, documents if kind != "padding" else None, length)
    if kind == "plain":
        found = flex._plain_mask(length, window, sinks, torch.device("cpu"))
    else:
        found = flex.window_mask(layout.position, window, sinks)
    wanted = create_block_mask(found.mask_mod, len(found.kv_num_blocks), None, length, length, device="cpu").to_dense()
    visited = found.to_dense()
    assert ((wanted > 0) & (visited == 0)).sum() == 0
    if kind == "plain":
        assert visited.equal(wanted)  # and not one more
    elif window < 200:
        assert visited.sum() < 0.7 * torch.ones_like(visited).tril().sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", [None, "padding", "one row of documents", "both"])
def test_flex_attention_under_its_mask_gives_the_same(kind, monkeypatch):
    """Not compiled: the CPU has no kernel for it."""
    from xlstm_distill.model import flex

    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    layout = layouts()[kind] if kind else None
    tensors = [x.float() for x in draw(40)]
    found = flex.flex_window(*tensors, 5, 2, layout)
    real = layout.real[:, None, :, None] if layout else True
    torch.testing.assert_close(found * real, window_attention(*tensors, 5, 2, layout) * real, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_kept_for_the_backward_pass_is_linear_in_the_length(padded):
    def kept(length):
        tensors = [torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3)]
        mask = torch.ones(1, length, dtype=torch.long)
        mask[0, :3] = 0
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attend(*tensors, 16, 4, mask if padded else None).sum()
        return sum(storages.values())

    assert kept(4096) < 2.2 * kept(2048)
    full = 4096 * 4096  # bytes of a mask over all pairs
    assert kept(4096) < full
