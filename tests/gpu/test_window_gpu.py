"""On a GPU: FlexAttention's window, output and gradients, is the masked softmax in float64.

python -m pytest -m gpu tests/gpu
"""

import pytest
import torch

from xlstm_distill.model.flex import has_flex
from xlstm_distill.model.layout import make_layout
from xlstm_distill.model.window import window_attention

GPU = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def reference(query, key, value, window, sinks, layout):
    """Float64, the mask written out."""
    length = query.shape[2]
    position = layout.position if layout else torch.arange(length, device=GPU)[None]
    document, ordinal = position >> 32, position % (1 << 32)
    distance = ordinal[:, :, None] - ordinal[:, None]
    seen = (distance >= 0) & ((distance < window) | (ordinal < sinks)[:, None])
    seen &= (document[:, :, None] == document[:, None]) & (position >= 0)[:, None] & (position >= 0)[:, :, None]
    seen |= torch.eye(length, dtype=torch.bool, device=GPU)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("kind", ["plain", "padding", "documents"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("length", "window", "sinks"), [(300, 64, 4), (1000, 512, 4), (257, 1, 0)])
def test_output_and_gradients(kind, dtype, bound, length, window, sinks):
    torch.manual_seed(0)
    mask = torch.ones(2, length, dtype=torch.long, device=GPU)
    mask[1, :37] = 0
    documents = (torch.arange(length, device=GPU) // 90)[None].expand(2, -1)
    layout = {"plain": None, "padding": make_layout(mask, None, length),
              "documents": make_layout(mask, documents, length)}[kind]  # fmt: skip
    tensors = [torch.randn(2, 3, length, 64, device=GPU, dtype=dtype) for _ in range(3)]
    assert has_flex(tensors[0])
    real = layout.real[:, None, :, None] if layout else 1.0
    weights = torch.randn(2, 3, length, 64, device=GPU, dtype=torch.float64) * real
    results = []
    for function, leaves in ((window_attention, tensors), (reference, [x.double() for x in tensors])):
        leaves = [x.clone().requires_grad_() for x in leaves]
        out = function(*leaves, window, sinks, layout)
        results.append([out * real, *torch.autograd.grad((out.double() * weights).sum(), leaves)])
    for found, wanted in zip(*results, strict=True):
        assert (found.double() - wanted).norm() / wanted.norm() <= bound
