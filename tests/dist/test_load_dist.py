"""A model is never whole on any rank: each reads, and holds, its share."""

import json
from pathlib import Path

import pytest
import torch
from model_support import FAMILIES, tiny_student, tiny_teacher
from ranks import Ranks

pytestmark = pytest.mark.dist
WORKER = str(Path(__file__).with_name("load_worker.py"))
MIB = 1 << 20
SHAPE = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
SLACK = 12 * MIB
"""Python objects, what the allocator keeps, and the reading of the meter."""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """`large`: 188 MiB in float32, in bfloat16 on disk as teachers are, in several files; `small` to warm up with."""
    folder = tmp_path_factory.mktemp("models")
    tiny_teacher(**SHAPE).bfloat16().save_pretrained(folder / "large", max_shard_size="20MB")
    assert len(list((folder / "large").glob("*.safetensors"))) >= 4
    tiny_teacher(**SHAPE | {"vocab_size": 64, "num_hidden_layers": 1}).save_pretrained(folder / "small")
    return folder


def sizes() -> tuple[int, int]:
    """Bytes of all parameters, and of the largest, in float32."""
    with torch.device("meta"):
        found = [4 * p.numel() for p in tiny_model().parameters()]
    return sum(found), max(found)


def tiny_model():
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))


def measure(task: str, strategy: str, world: int, large: Path, out: Path) -> list[dict]:
    Ranks([WORKER, task, strategy, str(large), str(out)], world, out).wait()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]


def bound(world: int) -> float:
    """The most that a rank may need while it loads: its share and one tensor."""
    whole, largest = sizes()
    return whole / world + largest + SLACK


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_rank_needs_its_share_and_one_tensor(large, tmp_path, strategy, world):
    whole, _ = sizes()
    for found in measure("memory", strategy, world, large, tmp_path):
        print(f"{strategy}, {world} ranks: peak {found['peak'] / MIB:.0f}, kept {found['kept'] / MIB:.0f} MiB "
              f"of {whole / MIB:.0f}; bound {bound(world) / MIB:.0f}")  # fmt: skip
        assert found["peak"] <= bound(world)
        assert found["kept"] >= 0.9 * whole / world  # the meter sees what is there


@pytest.mark.parametrize("world", [2, 4])
def test_a_model_that_every_rank_loads_whole_would_not_pass(large, tmp_path, world):
    for found in measure("whole", "fsdp", world, large, tmp_path):
        assert found["peak"] > bound(world)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_what_three_ranks_read_is_what_transformers_reads(tmp_path, strategy):
    """Three ranks divide no dimension of these models."""
    for family in FAMILIES:
        tiny_student(tmp_path / "models" / family, family, tied=family in ("llama", "qwen3"))
    Ranks([WORKER, "same", strategy, str(tmp_path / "models")], 3, tmp_path / "logs").wait()
