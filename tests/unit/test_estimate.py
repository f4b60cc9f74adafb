"""`xdl plan`: formulas against models, torch's allocations, the codec, sums by hand; what cannot fit is refused."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from model_support import FAMILIES, tiny_student

from launcher import estimate, tree
from launcher.backends import local
from launcher.caching import Caching, choices_of
from launcher.cli import main
from launcher.compose import compose
from launcher.disk import present, target_bytes, tokens_of
from launcher.estimate import CORE_FLOPS, CPU_MFU, LINEAR, MFU, RELATIVES, Estimate, estimates, refusals
from launcher.memory import peak
from launcher.parameters import count
from launcher.plan import plan, states
from launcher.tree import branches, plan_text
from xlstm_distill.contract.devices import find_device
from xlstm_distill.contract.files import append_line
from xlstm_distill.contract.flops import step_flops
from xlstm_distill.contract.schema import Config, Student, Teacher
from xlstm_distill.data import codec

ROOT = Path(__file__).parents[2]
LLAMA = ["teacher=llama-3.1-8b-instruct", "cluster=slurm"]
ONE_GPU, CODE = "cluster.stages.cache.gpus_per_node=1", "eval.allow_code_execution=true"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(config: Config, folder: Path = Path("nothing")) -> dict[str, Estimate]:
    graph = plan(config)
    return {e.job.name: e for e in estimates(graph, config, folder, states(graph, folder / "jobs"))}


def refused(overrides: list[str], folder: Path = Path("nothing")) -> list[str]:
    config = compose(overrides).config
    return refusals(list(made(config, folder).values()), config, folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_parameters_of_every_family_are_counted_exactly(tmp_path: Path, family: str, tied: bool) -> None:
    teacher, student = tiny_student(tmp_path, family, tied=tied)
    base = student.config.base
    shape = Teacher(
        "x", family, "folder", "x", tie_word_embeddings=tied, head_dim=student.config.head_dim,
        **{name: getattr(base, name) for name in (
            "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "vocab_size")},
    )  # fmt: skip
    counts = count(shape, Student(window=8, sinks=2))
    assert counts.total == sum(p.numel() for p in student.parameters())
    assert counts.teacher == sum(p.numel() for p in teacher.parameters())
    assert counts.layers * counts.new == sum(p.numel() for p in student.mixer_parameters().values())


@pytest.mark.parametrize("choices", [{"use_gates": False}, {"use_window": False}, {"gate_input": "hidden"}])
def test_idle_parameters_are_counted_too(tmp_path: Path, choices: dict) -> None:
    _, student = tiny_student(tmp_path, **choices)
    base = student.config.base
    counts = count(replace(_shape(base), head_dim=8), Student(**choices))
    assert counts.layers * counts.idle == sum(p.numel() for p in student.idle_parameters().values())
    assert counts.layers * counts.new == sum(p.numel() for p in student.mixer_parameters().values())


def _shape(base: object) -> Teacher:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return Teacher("x", "llama", "folder", "x", vocab_size=97, **{name: getattr(base, name) for name in names})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("distill", {"precision": "bfloat16"}),
        ("distill", {"precision": "bfloat16", "checkpointing": True, "ranks": 8, "accumulate": 2}),
        ("align", {"precision": "bfloat16"}),
    ],
)
def test_memory_is_what_torch_allocates_within_15_percent_part_by_part(stage: str, changes: dict) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import plan as benchmark
    finally:
        sys.path.pop(0)
    small = replace(benchmark.SMALL, num_hidden_layers=2)
    setting = benchmark.case(stage, small, sequence=256, **changes)
    measured, formula = benchmark.measure(setting, fake=setting.ranks > 1), benchmark.foretold(setting)
    assert {"weights", "gradients", "optimizer", "activations", "peak"} <= measured.keys()
    for part, size in measured.items():
        assert formula[part] == pytest.approx(size, rel=0.15), part


def test_the_states_of_the_optimiser_are_shared_by_the_ranks_and_their_sum_is_a_checkpoint() -> None:
    config = compose([*LLAMA, "cluster.stages.distill.gpus_per_node=8"]).config
    found = made(config)["distill-math"]
    assert found.memory is not None
    parameters = 8_030_261_248 + 32 * (2 * 32 * 128**2 + 2 * 32 * 4097 + 32 * 385)
    assert found.memory.weights == 4 * parameters / 8
    assert found.memory.optimizer == 8 * parameters / 8
    assert found.checkpoint == 12 * parameters
    assert found.memory.total == pytest.approx(24.35e9, rel=0.01)


def test_more_ranks_take_less_each_and_nodes_that_copy_take_more() -> None:
    config = compose([*LLAMA, "strategy=fsdp"]).config
    eight, sixteen = (peak(config, "distill", nodes, 8) for nodes in (1, 2))
    assert sixteen.optimizer == eight.optimizer / 2
    copied = replace(config, strategy=replace(config.strategy, shard="node"))
    assert peak(copied, "distill", 2, 8).optimizer == eight.optimizer


def test_recomputation_takes_less_and_an_online_teacher_more() -> None:
    config = compose([*LLAMA, "strategy=fsdp"]).config
    kept = replace(config, strategy=replace(config.strategy, activation_checkpointing=False))
    assert peak(kept, "distill", 1, 8).activations > 5 * peak(config, "distill", 1, 8).activations
    online = replace(config, distill=replace(config.distill, targets="online"))
    assert peak(online, "distill", 1, 8).teacher == 4 * 8_030_261_248 / 8 + 2 * (2 * 128256 * 4096 + 4096)
    assert peak(config, "distill", 1, 8).teacher == 0


@pytest.mark.parametrize(("top_k", "kept"), [(16, 1.33), (32, 1.33), (64, 1.28), (128, 1.28), (256, 1.28), (512, 1.28)])
def test_targets_take_a_header_and_so_many_bytes_for_each_kept_token(top_k: int, kept: float) -> None:
    empty = codec.encode(np.zeros((0, 32), np.int64), np.zeros((0, 32)), np.zeros(0), 49152)
    assert target_bytes(top_k, 64) * 64 == pytest.approx(len(empty) + 64 * top_k * kept)


def choices(overrides: list[str], folder: Path = Path("nothing")) -> Caching:
    config = compose(overrides).config
    found = choices_of(plan(config), config, folder)
    assert found is not None
    return found


def test_a_plan_says_what_each_way_to_get_the_targets_costs_and_from_when_on_caching_pays() -> None:
    found = choices([*LLAMA, "cache.top_k=48"])
    by_name = {choice.name: choice for choice in found.choices}
    assert list(by_name) == ["k=32", "k=48", "k=64", "k=256", "online"]
    assert [name for name, choice in by_name.items() if choice.chosen] == ["k=48"]
    teacher = step_flops("distill", compose(LLAMA).config.teacher, compose(LLAMA).config.student, 4096, online=True)
    drawn = 4 * compose(LLAMA).config.distill.tokens
    per_hour = 3600 * 989e12 * MFU
    assert by_name["k=32"].capture == pytest.approx(found.cached * teacher.teacher / per_hour)
    student = drawn * (teacher.forward + teacher.backward) / per_hour
    assert by_name["k=32"].rank_hours == pytest.approx(by_name["k=32"].capture + student)
    assert by_name["online"].rank_hours == pytest.approx(student + drawn * teacher.teacher / per_hour)
    assert by_name["online"].disk == by_name["online"].capture == 0
    assert by_name["k=256"].disk == pytest.approx(found.cached * (9 + target_bytes(256, 4096)))
    assert found.passes == pytest.approx(drawn / found.cached)
    assert found.break_even == pytest.approx(1.0)
    online = choices([*LLAMA, "distill.targets=online"])
    assert [choice.name for choice in online.choices if choice.chosen] == ["online"]


def test_an_online_run_is_shown_the_bytes_that_caching_would_take() -> None:
    cached, online = choices([]), choices(["distill.targets=online"])
    assert [c.disk for c in online.choices if c.name != "online"] == [c.disk for c in cached.choices if c.disk]


def test_sources_that_many_draw_from_make_caching_pay(tmp_path: Path) -> None:
    text = tree.caching_text(choices(["experts=[math]", "cache.max_samples=4", "distill.tokens=409600"]))
    assert "8.19k tokens to cache, each drawn 50.0 times" in text
    assert "(this plan)" in text.splitlines()[1]
    assert choices_of(plan(compose(["stage=tokenize"]).config), compose([]).config, tmp_path) is None


def test_the_pieces_of_a_source_share_its_tokens() -> None:
    config = compose(["cache.max_samples=0"]).config
    in_parts = {name: replace(source, parts=2) for name, source in config.data.sources.items()}
    config = replace(config, experts=(), data=replace(config.data, sources=in_parts))
    tokens = tokens_of(config, Path("nothing"))
    for name in in_parts:
        assert tokens[f"cached {name}/0"] == tokens[f"cached {name}/1"] == tokens[name] / 2


def test_a_teacher_that_does_not_fit_a_gpu_is_spread_over_several() -> None:
    config = compose(["teacher=llama-3.1-70b-instruct", "cluster=slurm", "stage=cache"]).config
    one, eight = peak(config, "cache", 1, 1), peak(config, "cache", 1, 8)
    assert one.weights > 140e9
    assert eight.weights == pytest.approx(4 * 70.55e9 / 8, rel=0.01)
    assert one.total > 80e9 > eight.total


def test_hours_are_the_steps_flops_at_the_assumed_share_of_the_devices_peak() -> None:
    config = compose([*LLAMA, "cluster.stages.distill.gpus_per_node=8", "cluster.gpu=a100-40"]).config
    found = made(config)["distill-math"]
    flops = step_flops("distill", config.teacher, config.student, 4096).total
    assert (found.steps, found.tokens, found.measured) == (19073, 19073 * 64 * 4096, False)
    assert found.hours == pytest.approx(flops * found.tokens / (8 * 312e12 * MFU) / 3600)
    assert found.segments == 4  # of 24 h but two minutes
    here = compose(["cluster=slurm", "cluster.stages.align.cpus_per_task=4"]).config
    flops = step_flops("align", here.teacher, here.student, 512).total
    assert made(here)["align"].hours == pytest.approx(flops * 49152 / (4 * CORE_FLOPS * CPU_MFU) / 3600)


def test_hours_of_a_search_are_those_of_the_candidates_that_are_left(tmp_path: Path) -> None:
    """recipe=hour: three experts in thirds are ten means; seven of them are no expert alone, so TIES has seven."""
    config = compose(["recipe=hour", "cluster=local"]).config
    cores = len(os.sched_getaffinity(0))
    flops = step_flops("distill", config.teacher, config.student, 512, online=True)
    sequences = 3 * 8 * 512
    student = sequences * (flops.forward + 2 * 576 * 49152) / (cores * CORE_FLOPS * CPU_MFU)
    teacher = sequences * flops.teacher / (cores * CORE_FLOPS * CPU_MFU)
    elements = 3 * count(config.teacher, config.student).total
    assert made(config, tmp_path)["merge"].hours == pytest.approx(
        (teacher + 17 * student + elements * (10 / LINEAR + 7 / RELATIVES)) / 3600
    )
    for _ in range(11):
        append_line(tmp_path / "jobs/merge/checkpoints/search.jsonl", {})
    assert made(config, tmp_path)["merge"].hours == pytest.approx(
        (teacher + 6 * student + elements * 6 / RELATIVES) / 3600
    )
    for other in ("merge.tasks=[local_perplexity]", "merge.search=0"):
        assert made(compose(["recipe=hour", "cluster=local", "merge.methods=[]", other]).config)["merge"].hours is None


def test_a_job_that_has_measured_its_own_pace_is_foretold_by_it(tmp_path: Path) -> None:
    config = compose([]).config
    folder = tmp_path / "jobs" / "align"
    folder.mkdir(parents=True)
    append_line(folder / "ledger.jsonl", {"event": "start", "time": 0.0, "step": 0, "ranks": 1})
    for step in range(1, 7):
        append_line(folder / "metrics.jsonl", {"step": step, "total": 96, "seconds": 40.0, "loss": 1.0})
    found = made(config, tmp_path)["align"]
    assert (found.measured, found.hours) == (True, pytest.approx(90 * 40 / 3600))
    assert "=1.0" in plan_text(plan(config), list(made(config, tmp_path).values()), config, tmp_path)
    wider = compose(["cluster=slurm", "cluster.stages.align.nodes=2", "align.batch=2", "align.tokens=98304"]).config
    assert made(wider, tmp_path)["align"].hours == pytest.approx(90 * 40 / 3600 / 2)


def test_sources_count_for_what_is_drawn_from_them_or_for_what_they_hold(tmp_path: Path) -> None:
    config = compose([*LLAMA]).config
    tokens = tokens_of(config, tmp_path)
    assert tokens["sft_math"] == pytest.approx(1.05 * 5e9 * 0.5 / 0.999)
    assert tokens["dolmino"] == pytest.approx(1.05 * 655_360_000 / 0.999)
    assert made(config)["fetch"].disk.shards == pytest.approx(5.5 * sum(tokens[name] for name in config.sources))
    whole = compose([*LLAMA, *(f"expert.math.sources.{name}.tokens=0" for name in config.expert["math"].sources)])
    assert tokens_of(whole.config, tmp_path)["sft_math"] == pytest.approx(5e9 * 0.5 * 1.001)
    assert tokens_of(compose([]).config, tmp_path)["demo_math"] == pytest.approx(49152 / 2 * 1.1)
    (tmp_path / "one.txt").write_text("x" * 1000)
    source = f"data.sources={{mine: {{weight: 1.0, kind: text, path: {tmp_path}/*.txt}}}}"
    small = compose(["~data.sources", source]).config
    assert tokens_of(small, tmp_path)["mine"] == 1000
    assert tokens_of(compose(["cache.max_samples=3"]).config, tmp_path)["cached demo_math"] == 2 * 3 * 512


def test_checkpoints_count_as_often_as_they_lie_there_together() -> None:
    demo = made(compose([]).config)["distill-math"].disk  # 12 steps, one every 6
    assert demo.checkpoints == 2
    assert made(compose(["distill.checkpoint_every=1"]).config)["distill-math"].disk.checkpoints == 3
    kept = compose(["distill.checkpoint_every=1", "guard.keep_every=4", "guard.keep=1"]).config
    assert made(kept)["distill-math"].disk.checkpoints == 5


def test_what_does_not_fit_a_gpu_is_refused_in_a_line_with_advice() -> None:
    lines = refused([*LLAMA, "strategy.activation_checkpointing=false", "distill.micro_batch=8", "cluster.gpu=a100-40"])
    assert len(lines) == 1
    assert lines[0].startswith("distill-math, distill-code, distill-stem, distill-chat: needs ")
    assert "GB per GPU, and an a100-40 holds 40 (most: activations, " in lines[0]
    assert "try strategy.activation_checkpointing=true, distill.micro_batch=1, more GPUs" in lines[0]
    (line,) = refused(["teacher=llama-3.1-70b-instruct", "cluster=slurm", "stage=cache", ONE_GPU])
    assert line.startswith("cache: needs 145")
    assert "distill.targets=online" in line
    assert not refused([*LLAMA])


def test_without_gpus_only_this_machines_memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_host_memory", lambda: 4e9)
    assert [line.partition(":")[0] for line in refused(["cluster=local"])] == ["distill-math, distill-code"]
    assert refused(["cluster=slurm"]) == []


def test_a_disk_that_is_too_small_is_refused_but_not_for_what_is_there_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(e.disk.total for e in made(compose([]).config).values())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=need - 1e6))
    (line,) = refused(["cluster=local"], tmp_path / "deep" / "run")
    assert "GB are to be written" in line
    assert "or --force" in line
    (tmp_path / "jobs/align/checkpoints").mkdir(parents=True)
    (tmp_path / "jobs/align/checkpoints/part").write_bytes(b"x" * 2_000_000)
    assert present(tmp_path / "jobs/align") == 2_000_000
    assert refused(["cluster=local"], tmp_path) == []


def test_launch_refuses_in_one_line_with_exit_code_2_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "_host_memory", lambda: 4e9)
    monkeypatch.setattr(local, "run", lambda *arguments: 0)
    assert main(["launch", "cluster=local"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: distill-math, distill-code: needs ")
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.glob("runs/*/*")] == ["lock"]
    assert main(["launch", "cluster=local", "--force"]) == 0
    assert main(["launch", "cluster=local", "--dry-run"]) == 0
    assert "warning: distill-math" in capsys.readouterr().err


def test_plan_prints_the_tree_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *LLAMA, ONE_GPU, CODE, "--gpus-per-node", "8"]) == 0
    text = capsys.readouterr().out
    assert "student: 8.07B parameters, 42.3M of them new" in text
    assert "989 TFLOP/s in bfloat16; hours: at an assumed MFU of 0.30" in text
    assert "\n   ├─ cache" in text
    assert "\n      ├─ distill-math " in text
    assert "after distill-math, distill-code, distill-stem too" in text
    assert "distill-math, distill-code, distill-stem, distill-chat     4.04" in text
    assert "warning: cache: 79 hours do not fit 1 × 24:00:00; give cluster.stages.cache more GPUs or time" in text
    assert not list(tmp_path.iterdir())


def test_plan_refuses_with_exit_code_2_and_gives_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "teacher=llama-3.1-70b-instruct", "cluster=slurm", "--nodes", "64", "--gpus-per-node", "8"]
    arguments += ["align.batch=512", "distill.batch=512", ONE_GPU, CODE, "--json"]
    assert main(arguments) == 2
    told = capsys.readouterr()
    plan = json.loads(told.out)
    assert plan["refused"] == [told.err.strip().removeprefix("error: ")]
    jobs = {job["name"]: job for job in plan["jobs"]}
    assert jobs["distill-code"]["nodes"] * jobs["distill-code"]["gpus_per_node"] == 512
    assert jobs["distill-code"]["memory"]["total"] < 80e9 < jobs["cache"]["memory"]["total"]
    assert jobs["merge"]["hours"] is None
    assert main([*arguments, "--force"]) == 0
    assert main([*arguments, "distill.targets=online"]) == 0


def test_a_window_that_holds_the_whole_sequence_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for window, told in ((512, True), (256, False)):
        assert main(["plan", f"student.window={window}"]) == 0
        assert ("holds all of data.sequence=512" in capsys.readouterr().out) is told


def test_the_tree_names_the_inputs_that_do_not_stand_above_a_job() -> None:
    found = {name: (branch, also) for branch, name, also in branches(plan(compose([]).config))}
    assert found["fetch"] == ("", ())
    assert found["cache"] == ("   ├─ ", ())
    assert found["distill-math"] == ("      ├─ ", ("cache",))
    assert found["merge"][1] == ("distill-math",)
    assert found["report"][1] == ()


@pytest.mark.parametrize(
    ("name", "memory"),
    [("h100", 80), ("a100-40", 40), ("NVIDIA A100-SXM4-40GB", 40), ("NVIDIA H200", 141), ("rtx-4090", 24)],
)
def test_a_device_has_the_memory_that_its_name_says_or_its_data_sheet(name: str, memory: float) -> None:
    device = find_device(name)
    assert device is not None
    assert device.memory == memory
    assert find_device("v100") is None


def test_a_gpu_that_nobody_knows_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "cluster.gpu=v100"]) == 2
    assert "cluster.gpu=v100: not known; name what is nearest of gb200" in capsys.readouterr().err


@pytest.mark.parametrize("choice", ["student.window=32", "student.layer_windows.1=64"])
def test_a_teacher_without_a_shape_is_planned_without_memory_and_hours(tmp_path: Path, choice: str) -> None:
    unknown = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = compose([*(f"teacher.{name}=0" for name in unknown), choice]).config
    found = made(config)
    assert found["distill-math"].memory is None
    assert found["distill-math"].steps == config.distill.tokens // (config.distill.batch * config.data.sequence)
    assert "distill-math" in plan_text(plan(config), list(found.values()), config, tmp_path)
