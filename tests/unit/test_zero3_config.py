"""What DeepSpeed is told follows from the strategy's settings; what it cannot do is said in one line."""

import sys

import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import Strategy as Settings
from xlstm_distill.parallel.strategy import make_strategy
from xlstm_distill.parallel.zero3 import deepspeed_config


def test_stage_3_clips_and_leaves_batches_and_schedule_to_the_loop():
    config = deepspeed_config(Settings(name="zero3", precision="float32"), hidden_size=64, max_norm=1.5)
    assert config["zero_optimization"]["stage"] == 3
    assert config["gradient_clipping"] == 1.5
    assert config["gradient_accumulation_steps"] == config["train_micro_batch_size_per_gpu"] == 1
    assert "scheduler" not in config
    assert "optimizer" not in config


@pytest.mark.parametrize(("precision", "low"), [("float32", False), ("bfloat16", True)])
def test_gradients_are_summed_in_float32_whatever_the_products_are(precision, low):
    config = deepspeed_config(Settings(name="zero3", precision=precision), 64, 0.0)
    assert config["bf16"]["enabled"] is low
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"


def test_only_offload_puts_parameters_and_optimiser_on_the_host():
    stays, leaves = (
        deepspeed_config(Settings(name="zero3", offload=offload), 64, 0.0)["zero_optimization"]
        for offload in (False, True)
    )
    assert leaves["offload_param"]["device"] == leaves["offload_optimizer"]["device"] == "cpu"
    assert stays == {k: v for k, v in leaves.items() if not k.startswith("offload")}


def test_buckets_and_the_threshold_for_staying_whole_grow_with_the_model():
    small, large = (deepspeed_config(Settings(), hidden, 0.0)["zero_optimization"] for hidden in (32, 4096))
    assert small["stage3_param_persistence_threshold"] == 320  # a norm stays whole, a projection does not
    assert large["reduce_bucket_size"] == 4096**2


@pytest.mark.parametrize(
    ("changes", "line"),
    [({"compile": True}, r"strategy\.compile=true: .*fsdp"), ({"shard": "node"}, r"strategy\.shard=node: .*fsdp")],
)
def test_what_only_fsdp_can_is_refused_by_name(changes, line):
    with pytest.raises(Mistake, match=line):
        make_strategy(Settings(name="zero3", **changes), World())


def test_without_deepspeed_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(Mistake, match=r"DS_BUILD_OPS=0 pip install .*deepspeed"):
        make_strategy(Settings(name="zero3"), World())
