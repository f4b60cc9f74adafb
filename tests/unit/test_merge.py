"""Merging: the weighted mean of every tensor, in the type of the inputs, whole or not at all."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import Job, JobFolder, World
from xlstm_distill.contract.schema import Config, Expert, Teacher
from xlstm_distill.merge import ModelFolder, merge_linear, run, scale_weights


def tensors(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(5, 3).to(dtype), "b.bias": torch.randn(7).to(dtype), "steps": torch.arange(4)}


def model_folder(path, content, **config):
    path.mkdir(parents=True)
    save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (path / "tokenizer.json").write_text("{}")
    return path


def two(tmp_path, dtype=torch.float32):
    return [model_folder(tmp_path / f"e{i}", tensors(i, dtype)) for i in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_merge_is_the_weighted_mean_in_the_type_of_the_inputs(tmp_path, dtype):
    merge_linear(two(tmp_path, dtype), [0.3, 0.7], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name in ("a.weight", "b.bias"):
        expected = 0.3 * tensors(0, dtype)[name].double() + 0.7 * tensors(1, dtype)[name].double()
        assert merged[name].dtype == dtype
        torch.testing.assert_close(
            merged[name], expected.to(dtype), rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-7
        )


def test_bfloat16_is_summed_in_float32_and_rounded_once(tmp_path):
    values = (1.0, 1.0078125, 1.0)
    experts = [model_folder(tmp_path / f"e{i}", {"w": torch.full((2,), v).bfloat16()}) for i, v in enumerate(values)]
    merge_linear(experts, [1 / 3] * 3, tmp_path / "merged")
    exact = torch.tensor([sum(values) / 3]).bfloat16()
    assert load_file(tmp_path / "merged" / "model.safetensors")["w"][0] == exact[0]


def test_one_expert_with_all_the_weight_comes_back_byte_for_byte(tmp_path):
    experts = two(tmp_path)
    merge_linear(experts, [1.0, 0.0], tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (experts[0] / "model.safetensors").read_bytes()
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"


def test_an_expert_of_weight_zero_does_not_spread_its_nan(tmp_path):
    broken = {**tensors(1), "b.bias": torch.full((7,), torch.nan)}
    experts = [model_folder(tmp_path / "e0", tensors(0)), model_folder(tmp_path / "e1", broken)]
    merge_linear(experts, [1.0, 0.0], tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors")["b.bias"].isfinite().all()


def test_sharded_and_tied_models_merge_and_load(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config))
        models[-1].save_pretrained(tmp_path / f"e{seed}", max_shard_size="12KB")
    assert len(ModelFolder(tmp_path / "e0").files) > 1
    merge_linear([tmp_path / "e0", tmp_path / "e1"], [0.25, 0.75], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, value in merged.state_dict().items():
        expected = 0.25 * models[0].state_dict()[name] + 0.75 * models[1].state_dict()[name]
        torch.testing.assert_close(value, expected)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop("b.bias"), {}, "tensor b.bias stands only in .*e0"),
        (lambda t: t.update({"b.bias": torch.zeros(8)}), {}, r"b.bias is F32\[7\] and F32\[8\]"),
        (lambda t: t.update({"b.bias": torch.zeros(7).half()}), {}, r"b.bias is F32\[7\] and F16\[7\]"),
        (
            lambda t: t.update({"steps": torch.zeros(4, dtype=torch.int64)}),
            {},
            r"steps .* differs between .* has no mean",
        ),
        (lambda t: None, {"window": 64}, "config.json: window=None and 64"),
    ],
)
def test_experts_that_do_not_fit_together_are_refused_and_nothing_is_written(tmp_path, change, config, message):
    other = tensors(1)
    change(other)
    experts = [model_folder(tmp_path / "e0", tensors(0)), model_folder(tmp_path / "e1", other, **config)]
    with pytest.raises(Mistake, match=message):
        merge_linear(experts, [0.5, 0.5], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_different_tokenizers_are_refused(tmp_path):
    experts = two(tmp_path)
    (experts[1] / "tokenizer.json").write_text("{ }")
    with pytest.raises(Mistake, match=r"tokenizer\.json differs"):
        merge_linear(experts, [0.5, 0.5], tmp_path / "merged")


def test_weights_are_scaled_to_sum_to_one_and_bad_ones_refused():
    assert scale_weights({"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}
    with pytest.raises(Mistake, match=r"expert\.b\.merge_weight=-1"):
        scale_weights({"a": 1.0, "b": -1})
    with pytest.raises(Mistake, match="all zero"):
        scale_weights({"a": 0.0})


class NoStop:
    def check(self):
        pass


@pytest.fixture
def run_folder(tmp_path):
    """Two finished experts from one alignment, and the merge job over them."""
    config = Config(
        teacher=Teacher("t", "llama", "folder", "t"),
        experts=("math", "code"),
        expert={"math": Expert(merge_weight=1.0), "code": Expert(merge_weight=3.0)},
    )

    def job(name, stage, inputs=()):
        folder = JobFolder(tmp_path / "jobs" / name, Job(name, stage, {}, inputs), config)
        folder.output.mkdir(parents=True)
        return folder

    align = job("align", "align")
    (align.output / "x").write_text("student")
    align.finish({})
    for seed, name in enumerate(config.experts):
        expert = job(f"distill-{name}", "distill", ("align",))
        model_folder(expert.output / "student", tensors(seed))
        expert.finish({})
    return job("merge", "merge", ("distill-math", "distill-code"))


def test_the_stage_merges_by_the_experts_weights(run_folder):
    facts = run(run_folder, World(), NoStop())
    merged = run_folder.output / "student" / "model.safetensors"
    assert facts == {"weights": {"math": 0.25, "code": 0.75}, "bytes": merged.stat().st_size, "tensors": 3}
    expected = 0.25 * tensors(0)["a.weight"] + 0.75 * tensors(1)["a.weight"]
    torch.testing.assert_close(load_file(merged)["a.weight"], expected)


def test_a_missing_expert_is_named(run_folder):
    (run_folder.sibling("distill-code") / "manifest.json").unlink()
    with pytest.raises(Mistake, match="expert code is not finished"):
        run(run_folder, World(), NoStop())


def test_a_changed_byte_in_an_expert_is_found(run_folder):
    weights = run_folder.input("distill-math") / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Mistake, match=r"expert math: .*model\.safetensors has xxh64"):
        run(run_folder, World(), NoStop())


def test_experts_of_different_students_are_refused(run_folder):
    align = JobFolder(run_folder.sibling("align"), Job("align", "align", {"seed": 1}), run_folder.config)
    align.finish({})
    code = run_folder.sibling("distill-code")
    JobFolder(code, Job("distill-code", "distill", {}, ("align",)), run_folder.config).finish({})
    with pytest.raises(Mistake, match="math and code start from different students"):
        run(run_folder, World(), NoStop())


def test_a_stopped_merge_leaves_nothing_behind(run_folder):
    class StopNow:
        def check(self):
            raise Stopped

    with pytest.raises(Stopped):
        run(run_folder, World(), StopNow())
    assert list(run_folder.output.iterdir()) == []


def test_a_run_without_experts_has_nothing_to_merge(run_folder):
    with pytest.raises(Mistake, match="nothing to merge"):
        run(replace(run_folder, config=replace(run_folder.config, experts=())), World(), NoStop())
