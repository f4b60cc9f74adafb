"""Merging: the weighted mean of every tensor, in the type of the inputs, whole or not at all."""

import errno
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from merge_support import NoStop, merge, merged, model_folder, run_folder, tensors
from safetensors.torch import load_file, save_file

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import Job, JobFolder, World
from xlstm_distill.merge import ModelFolder
from xlstm_distill.merge.linear import is_finite, weighted_sum
from xlstm_distill.merge.stage import run
from xlstm_distill.runtime.metrics import read_metrics


def two(tmp_path, dtype=torch.float32):
    return [model_folder(tmp_path / f"e{i}", tensors(i, dtype)) for i in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_merge_is_the_weighted_mean_in_the_type_of_the_inputs(tmp_path, dtype):
    found = merged(tmp_path, [tensors(i, dtype) for i in range(2)], [0.3, 0.7])
    for name in ("a.weight", "b.bias"):
        expected = 0.3 * tensors(0, dtype)[name].double() + 0.7 * tensors(1, dtype)[name].double()
        assert found[name].dtype == dtype
        tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-7}
        torch.testing.assert_close(found[name].double(), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_are_those_of_a_float32_sum_in_the_order_of_the_experts_rounded_once(tmp_path, dtype):
    given = [{"w": (torch.randn(70_001) * 2.0 ** torch.randint(-12, 9, (70_001,))).to(dtype)} for _ in range(4)]
    weights = [0.35, 0.35, 0.2, 0.1]
    total = torch.zeros(70_001)
    for content, weight in zip(given, weights, strict=True):
        total = total + content["w"].float() * torch.tensor(weight, dtype=torch.float32)
    assert torch.equal(merged(tmp_path, given, weights)["w"], total.to(dtype))


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even():
    halves = torch.tensor([1.0, -1.0, 3.0, 1e-40, -0.0, 3.3e38]).bfloat16()
    steps = torch.tensor([2**-7, 2**-7, 2**-6, 1e-40, -0.0, 3.3e38]).bfloat16()
    raws = [halves.view(torch.uint8).numpy(), (halves + steps).view(torch.uint8).numpy()]
    found = torch.from_numpy(weighted_sum(raws, [0.5, 0.5], "BF16")).view(torch.bfloat16)
    expected = (halves.float() * 0.5 + (halves + steps).float() * 0.5).bfloat16()
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32"),
                                             (torch.float64, "F64")])  # fmt: skip
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_in_every_type_and_the_largest_number_is_finite(dtype, name, bad):
    values = torch.full((70_000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(values.view(torch.uint8).numpy(), name)
    values[-1] = bad
    assert not is_finite(values.view(torch.uint8).numpy(), name)


def test_one_expert_with_all_the_weight_comes_back_byte_for_byte(tmp_path):
    experts = two(tmp_path)
    merge(tmp_path / "merged", experts, [1.0, 0.0])
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (experts[0] / "model.safetensors").read_bytes()
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"


def test_a_single_expert_is_its_own_merge(tmp_path):
    content = {**tensors(0), "zero": torch.tensor([0.0, -0.0])}
    expert = model_folder(tmp_path / "e0", content)
    merge(tmp_path / "merged", [expert], [0.2])
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (expert / "model.safetensors").read_bytes()


def test_a_nan_is_refused_with_the_expert_and_the_tensor_that_hold_it(tmp_path):
    broken = {**tensors(1), "b.bias": torch.full((7,), torch.nan)}
    with pytest.raises(Mistake, match=r"merge: b\.bias: expert 1 holds a NaN or an infinite value"):
        merged(tmp_path, [tensors(0), broken], [0.5, 0.5])
    assert not any(path.name.endswith(("merged", ".tmp")) for path in tmp_path.iterdir())


def test_an_expert_of_weight_zero_does_not_spread_its_nan(tmp_path):
    broken = {**tensors(1), "b.bias": torch.full((7,), torch.nan)}
    found = merged(tmp_path, [tensors(0), broken], [1.0, 0.0])
    assert torch.equal(found["b.bias"], tensors(0)["b.bias"])


def test_a_shard_at_a_time_and_tied_embeddings_stay_tied(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config))
        models[-1].save_pretrained(tmp_path / f"e{seed}", max_shard_size="12KB")
    assert len(ModelFolder(tmp_path / "e0").files) > 1
    merge(tmp_path / "merged", [tmp_path / "e0", tmp_path / "e1"], [0.25, 0.75])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, value in found.state_dict().items():
        expected = 0.25 * models[0].state_dict()[name] + 0.75 * models[1].state_dict()[name]
        torch.testing.assert_close(value, expected)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_single_file_goes_before_an_old_index_as_in_transformers(tmp_path):
    experts = two(tmp_path)
    (experts[1] / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "gone.safetensors"}}')
    assert ModelFolder(experts[1]).files == ["model.safetensors"]
    assert merge(tmp_path / "m1", experts, [0.5, 0.5]).keys() == tensors(0).keys()


def test_experts_that_are_cut_into_other_shards_merge_to_the_same(tmp_path):
    experts = two(tmp_path)
    content = tensors(1)
    (experts[1] / "model.safetensors").unlink()
    save_file({"b.bias": content["b.bias"]}, experts[1] / "x.safetensors")
    save_file({"steps": content["steps"], "a.weight": content["a.weight"]}, experts[1] / "y.safetensors")
    index = '{"weight_map": {"b.bias": "x.safetensors", "steps": "y.safetensors", "a.weight": "y.safetensors"}}'
    (experts[1] / "model.safetensors.index.json").write_text(index)
    (tmp_path / "other").mkdir()
    assert merge(tmp_path / "m1", experts, [0.5, 0.5]).keys() == content.keys()
    expected = merged(tmp_path / "other", [tensors(0), tensors(1)], [0.5, 0.5])
    assert all(
        torch.equal(value, expected[name]) for name, value in load_file(tmp_path / "m1/model.safetensors").items()
    )


def test_integers_that_agree_are_kept(tmp_path):
    assert torch.equal(merged(tmp_path, [tensors(0), tensors(1)], [0.5, 0.5])["steps"], torch.arange(4))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop("b.bias"), {}, "tensor b.bias stands only in .*e0"),
        (lambda t: t.update(new=torch.zeros(1)), {}, "tensor new stands only in .*e1"),
        (lambda t: t.update({"b.bias": torch.zeros(8)}), {}, r"b.bias is \[7\] and \[8\]"),
        (lambda t: t.update({"b.bias": torch.zeros(7).half()}), {}, r"b.bias is F32 and F16"),
        (
            lambda t: t.update({"steps": torch.zeros(4, dtype=torch.int64)}),
            {},
            r"steps \(I64\) differs between the exp",
        ),
        (lambda t: None, {"window": 64}, "config.json: window=None and 64"),
    ],
)
def test_experts_that_do_not_fit_together_are_refused_and_nothing_is_written(tmp_path, change, config, message):
    other = tensors(1)
    change(other)
    experts = [model_folder(tmp_path / "e0", tensors(0)), model_folder(tmp_path / "e1", other, **config)]
    with pytest.raises(Mistake, match=message):
        merge(tmp_path / "merged", experts, [0.5, 0.5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0", "e1"]


def test_different_tokenizers_are_refused(tmp_path):
    experts = two(tmp_path)
    (experts[1] / "tokenizer.json").write_text("{ }")
    with pytest.raises(Mistake, match=r"tokenizer\.json differs"):
        merge(tmp_path / "merged", experts, [0.5, 0.5])


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    experts = two(tmp_path)
    (experts[1] / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(Mistake, match=r"e1/model\.safetensors: not a safetensors file"):
        merge(tmp_path / "merged", experts, [0.5, 0.5])


def test_a_disk_that_is_full_midway_leaves_nothing_behind(tmp_path):
    experts = [model_folder(tmp_path / f"e{i}", {n: torch.randn(90_000) for n in "abc"}) for i in range(2)]
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            merge(tmp_path / "merged", experts, [0.5, 0.5])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0", "e1"]


@pytest.fixture
def job(tmp_path):
    """Two finished experts from one alignment, and the merge job over them."""
    return run_folder(tmp_path, {"math": (1.0, tensors(0)), "code": (3.0, tensors(1))})


def test_the_stage_merges_by_the_experts_weights(job):
    facts = run(job, World(), NoStop())
    written = job.output / "student" / "model.safetensors"
    weights = {"math": 0.25, "code": 0.75}
    assert facts == {"method": "linear", "weights": weights, "bytes": written.stat().st_size, "tensors": 3}
    expected = 0.25 * tensors(0)["a.weight"] + 0.75 * tensors(1)["a.weight"]
    torch.testing.assert_close(load_file(written)["a.weight"], expected)
    assert [(r["step"], r["total"]) for r in read_metrics(job.path)] == [(1, 3), (2, 3), (3, 3)]


def test_a_mean_needs_no_torch(job):
    code = (
        "import sys; from pathlib import Path; from xlstm_distill.stages import run_job\n"
        f"run_job(Path({str(job.path)!r})); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
    assert (job.output / "student" / "model.safetensors").is_file()


def test_an_expert_that_is_no_specialist_takes_no_part(job):
    both = {**job.config.expert, "union": replace(job.config.expert["math"], union_of=("math", "code"))}
    facts = run(
        replace(job, config=replace(job.config, experts=("math", "code", "union"), expert=both)), World(), NoStop()
    )
    assert facts["weights"] == {"math": 0.25, "code": 0.75}


def test_a_missing_expert_is_named(job):
    (job.sibling("distill-code") / "manifest.json").unlink()
    with pytest.raises(Mistake, match="expert code is not finished"):
        run(job, World(), NoStop())


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_changed_byte_in_an_expert_is_found_and_nothing_is_written(job, place):
    weights = job.input("distill-math") / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[place] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Mistake, match=r"math.*model\.safetensors"):
        run(job, World(), NoStop())
    assert list(job.output.iterdir()) == []


def test_a_byte_that_makes_a_nan_is_told_as_damage(job):
    weights = job.input("distill-math") / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-36:-32] = np.float32(np.nan).tobytes()
    weights.write_bytes(content)
    with pytest.raises(Mistake, match=r"expert math: .*model\.safetensors has xxh64"):
        run(job, World(), NoStop())


def test_a_changed_tokenizer_or_a_cut_file_is_found_before_the_weights_are_read(job):
    (job.input("distill-math") / "student" / "tokenizer.json").write_text("{x")
    with pytest.raises(Mistake, match=r"expert math: .*tokenizer\.json has xxh64"):
        run(job, World(), NoStop())
    weights = job.input("distill-code") / "student" / "model.safetensors"
    (job.input("distill-math") / "student" / "tokenizer.json").write_text("{}")
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(Mistake, match=r"expert code: .*model\.safetensors has \d+ bytes"):
        run(job, World(), NoStop())


def test_settings_changed_by_hand_in_a_manifest_are_found(job):
    path = job.sibling("distill-math") / "manifest.json"
    path.write_text(path.read_text().replace('"identity": {}', '"identity": {"seed": 7}'))
    with pytest.raises(Mistake, match=r"expert math: .* different settings"):
        run(job, World(), NoStop())


def realigned(job):
    align = JobFolder(job.sibling("align"), Job("align", "align", {"seed": 1}), job.config)
    return align.finish({})


def test_experts_of_different_students_are_refused_and_it_is_said_which_stands(job):
    align = realigned(job)
    code = job.sibling("distill-code")
    JobFolder(code, Job("distill-code", "distill", {}, ("align",)), job.config).finish({})
    said = (
        r"math and code start from different students: math from the alignment \w+, which does not stand any more, "
        rf"code from the alignment {align.digest}, which stands"
    )
    with pytest.raises(Mistake, match=said):
        run(job, World(), NoStop())


def test_experts_that_started_from_different_folders_are_refused_with_both(tmp_path):
    job = run_folder(tmp_path, {"math": (1.0, tensors(0)), "code": (1.0, tensors(1))}, inputs=())
    for name in ("math", "code"):
        start = {"student.init_from": f"/students/{name}"}
        expert = JobFolder(job.sibling(f"distill-{name}"), Job(f"distill-{name}", "distill", start), job.config)
        expert.write()
        expert.finish({"started_from": {"model.safetensors": "a"}})
    said = r"math from student.init_from=/students/math \(\w+\), code from student.init_from=/students/code \(\w+\)"
    with pytest.raises(Mistake, match=said):
        run(job, World(), NoStop())


def test_experts_that_started_from_one_folder_which_changed_between_them_are_refused(tmp_path):
    job = run_folder(tmp_path, {"math": (1.0, tensors(0)), "code": (1.0, tensors(1))}, inputs=())
    start = {"student.init_from": "/students/one"}
    for name, found in (("math", "a"), ("code", "b")):
        expert = JobFolder(job.sibling(f"distill-{name}"), Job(f"distill-{name}", "distill", start), job.config)
        expert.write()
        expert.finish({"started_from": {"model.safetensors": found}})
    with pytest.raises(Mistake, match=r"math and code start from different students: .*/students/one \(\w+\)"):
        run(job, World(), NoStop())


def test_a_stopped_merge_leaves_nothing_behind(job):
    class StopNow:
        def check(self):
            raise Stopped

    with pytest.raises(Stopped):
        run(job, World(), StopNow())
    assert list(job.output.iterdir()) == []


def test_a_run_without_experts_has_nothing_to_merge(job):
    with pytest.raises(Mistake, match="nothing to merge"):
        run(replace(job, config=replace(job.config, experts=())), World(), NoStop())


def test_methods_over_task_vectors_need_the_alignment_that_the_experts_started_from(tmp_path):
    job = run_folder(tmp_path, {"math": (1.0, tensors(0)), "code": (1.0, tensors(1))}, method="task_arithmetic")
    assert run(job, World(), NoStop())["method"] == "task_arithmetic"
    start = job.input("align") / "student" / "model.safetensors"
    whole = start.read_bytes()
    start.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Mistake, match=r"the student that the experts started from: .*xxh64"):
        run(job, World(), NoStop())
    start.write_bytes(whole)
    realigned(job)
    with pytest.raises(
        Mistake, match=r"merge.method=task_arithmetic: expert math was distilled from the alignment \w+"
    ):
        run(job, World(), NoStop())
