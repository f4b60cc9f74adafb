"""On a GPU: Triton's kernel is the float64 recurrence, passes its check at real sizes, and trains a student.

python -m pytest -m gpu tests/gpu
"""

import pytest
import torch
from model_support import VOCABULARY, tiny_teacher
from triton_support import CASES, bound, errors

from xlstm_distill.model import convert
from xlstm_distill.model.kernel import check, choose, name_of
from xlstm_distill.model.mlstm import mlstm
from xlstm_distill.model.modeling import HybridForCausalLM

GPU = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", CASES)
def test_output_state_and_gradients_are_those_of_the_recurrence(name):
    for tensor, error in errors(name, "cuda").items():
        assert error <= bound(name), f"{tensor}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key_width", "value_width"), [(64, 64), (128, 128), (256, 128)])
def test_the_chosen_kernel_is_tritons_and_passes_its_check(dtype, key_width, value_width):
    kernel = choose("auto", GPU)
    assert name_of(kernel) == "triton"
    check(kernel, GPU, dtype, key_width, value_width, 64)


def test_a_hundred_thousand_steps_stay_finite_and_near_the_torch_form():
    torch.manual_seed(0)
    query, key = (torch.randn(1, 2, 100_000, 64, device=GPU).softmax(-1) for _ in range(2))
    value = torch.randn(1, 2, 100_000, 64, device=GPU)
    gates = 5 * torch.randn(1, 2, 100_000, device=GPU), -torch.rand(1, 2, 100_000, device=GPU) / 100
    for found, wanted in zip(choose("triton", GPU)(query, key, value, *gates, None, 64),
                             mlstm(query, key, value, *gates, None, 64), strict=True):  # fmt: skip
        assert found.isfinite().all()
        assert (found - wanted).norm() / wanted.norm() < 1e-3


def test_a_students_loss_and_gradients_are_those_of_the_torch_form(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    (tmp_path / "student").mkdir()
    convert(tmp_path / "teacher", tmp_path / "student", window=4, sinks=2)
    tokens = torch.randint(3, VOCABULARY, (2, 90), device=GPU)
    found = {}
    for kernel in ("torch", "triton"):
        student = HybridForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32, kernel=kernel).to(GPU)
        for mixer in student.mixers:
            mixer.output_gate.bias.data.zero_()
        student(input_ids=tokens, labels=tokens).loss.backward()
        found[kernel] = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for name, wanted in found["torch"].items():
        torch.testing.assert_close(found["triton"][name], wanted, atol=1e-5, rtol=1e-3, msg=name)
