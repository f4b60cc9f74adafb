"""On a GPU: the distillation loss is what float64 autograd makes of its definition, as on a CPU.

python -m pytest -m gpu tests/gpu
"""

import pytest
import torch
from test_distill_loss import OPTIONS, PAIRS, assert_equal_to_plain, problem

from xlstm_distill.objectives.distill import DenseTargets, distillation_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("kind", "divergence"), PAIRS)
def test_value_and_gradients_are_those_of_autograd(kind, divergence, option):
    *tensors, targets = problem(kind, **OPTIONS[option])
    moved = type(targets)(*(x.cuda() if torch.is_tensor(x) else x for x in vars(targets).values()))
    given = (*(x.cuda() for x in tensors), moved)
    assert_equal_to_plain(kind, given, chunk=7, divergence=divergence, **OPTIONS[option])


def test_products_of_bfloat16_are_not_rounded_to_it():
    """A student that is its teacher has no KL, however large the logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*shape, generator=generator).bfloat16().cuda() for shape in ((64, 256), (4096, 256)))
    labels, weights = torch.zeros(64, dtype=torch.int64).cuda(), torch.full((64,), 1 / 64).cuda()
    x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    same = DenseTargets(hidden, head)
    loss = distillation_loss(x, w, labels, weights, same, kind="full", gamma=0.0, beta=1.0, chunk=16)
    assert loss.kl.item() < 1e-6
    loss.loss.backward()
    assert w.grad.abs().max() < 1e-6
