"""Which kernel runs where, and that a wrong one is refused before anything is trained."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from model_support import tiny_student
from train_support import make_run, run, training_job

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Model
from xlstm_distill.evaluate.models import ModelPlace, load_model
from xlstm_distill.model import kernel as module
from xlstm_distill.model.kernel import KERNELS, check, choose, name_of
from xlstm_distill.model.mlstm import mlstm

CPU = torch.device("cpu")
TENSORS = ("the output", "the last state", "query", "key", "value", "log_input", "log_forget", "state")


class Leaning(torch.autograd.Function):
    """x, with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def leaning_on(number):
    def leaning(*given):
        given = [Leaning.apply(x) if n == number else x for n, x in enumerate(given)]
        output, last = mlstm(*given)
        more = [0.01 * x.detach() if n == number else 0 for n, x in ((-2, output), (-1, last))]
        return output + more[0], last + more[1]

    return leaning


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_on_a_cpu_torch_computes(name):
    assert choose(name, CPU) is mlstm
    assert name_of(choose(name, CPU)) == "torch"


def test_a_name_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"kernel='cuda': expected one of auto, torch, triton"):
        choose("cuda", CPU)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_without_a_gpu_is_refused_but_for_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="kernel=triton: needs a CUDA device, and this is cpu; use kernel=auto"):
        choose("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert name_of(choose("triton", CPU)) == "triton"


def test_without_triton_a_gpu_takes_torch_and_asking_for_triton_is_refused(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(module, "_triton", lambda: (None, "Triton cannot be imported (no module)"))
    monkeypatch.setattr(module, "_made_for_triton", lambda device: True)
    assert choose("auto", gpu) is mlstm
    with pytest.raises(ValueError, match="kernel=triton: Triton cannot be imported"):
        choose("triton", gpu)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("widths", [(64, 64), (24, 12)])
def test_the_torch_form_passes_its_check_within_a_margin(dtype, bound, widths):
    assert 0 < check(mlstm, CPU, dtype, *widths, 16) < bound


@pytest.mark.parametrize("number", range(-2, 6))
def test_a_kernel_with_one_tensor_one_percent_off_is_refused_by_name_tensor_and_error(number):
    tensor = TENSORS[number + 2]
    with pytest.raises(ValueError, match=rf"kernel=leaning: on cpu in float32 it is wrong: .* 1\.0e-02 of .*{tensor}"):
        check(leaning_on(number), CPU)


def test_a_kernel_that_gives_no_number_or_fails_is_refused_by_name():
    def empty(*given):
        output, last = mlstm(*given)
        return output * torch.nan, last

    def failing(*given):
        raise RuntimeError("out of resource: shared memory\nand a long trace")

    with pytest.raises(ValueError, match=r"kernel=empty: .* relative error inf"):
        check(empty, CPU)
    with pytest.raises(ValueError, match=r"kernel=failing: .* it fails, RuntimeError: out of resource: shared memory;"):
        check(failing, CPU)


def test_the_check_leaves_the_random_numbers_of_training_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check(leaning_on(9), CPU)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_training_says_which_kernel_it_takes_and_does_not_begin_with_a_wrong_one(jobs, stage, monkeypatch, capsys):
    folder = training_job(jobs, f"right-{stage}", stage)
    run(folder)
    assert "mLSTM kernel: torch, within" in capsys.readouterr().out
    folder = training_job(jobs, f"wrong-{stage}", stage)
    monkeypatch.setattr("xlstm_distill.model.mixer.choose", lambda name, device: leaning_on(4))
    with pytest.raises(Mistake, match=r"model\.kernel=leaning: .*the gradient of log_forget"):
        run(folder)
    assert not (folder.path / "metrics.jsonl").exists()


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_training_and_evaluation_refuse_in_one_line_a_kernel_that_cannot_run_here(jobs, stage, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = training_job(jobs, f"triton-{stage}", stage)
    with pytest.raises(Mistake, match=r"^model\.kernel=triton: [^\n]*use kernel=auto[^\n]*$"):
        run(replace(folder, config=replace(folder.config, model=Model(kernel="triton"))))
    student = ModelPlace("aligned", "align", jobs / "align/output/student", {"kernel": "triton"})
    with pytest.raises(Mistake, match=r"^model\.kernel=triton: [^\n]*use kernel=auto[^\n]*$"):
        load_model(student)


def test_the_settings_offer_the_kernels_that_there_are():
    from typing import get_args, get_type_hints

    assert get_args(get_type_hints(Model)["kernel"]) == KERNELS


def test_rope_after_the_features_is_left_to_the_torch_form(tmp_path):
    _, student = tiny_student(tmp_path, feature_rope="after", kernel="triton")
    assert name_of(student.mixers[0].kernel_on(torch.device("cpu"))) == "torch"
