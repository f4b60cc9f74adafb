"""The methods over task vectors against the formulas of their papers, written naively in float64."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from merge_support import NoStop, merge, merged, model_folder, run_folder, tensors
from safetensors.torch import load_file

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import World
from xlstm_distill.merge import methods
from xlstm_distill.merge.methods import merge_utils
from xlstm_distill.merge.stage import run

NAMES = ("a.weight", "b.bias")
WEIGHTS = [0.5, 0.3, 0.2]


def step(seed, scale=0.1):
    """An expert: the start and a step away from it."""
    start, noise = tensors(9), tensors(seed)
    return {name: start[name] + scale * noise[name] if name in NAMES else start[name] for name in start}


EXPERTS = [step(seed) for seed in (1, 2, 3)]


def vectors(name, experts=EXPERTS):
    return [(e[name].double() - tensors(9)[name].double()).flatten().tolist() for e in experts]


def check(found, expected, scale=1.0, rtol=1e-6):
    """`expected`: name → the merged task vector, as a flat list."""
    for name in NAMES:
        wanted = tensors(9)[name].double().flatten() + scale * torch.tensor(expected(name), dtype=torch.float64)
        torch.testing.assert_close(found[name].double().flatten(), wanted, rtol=rtol, atol=1e-7)


def weighted(deltas, weights):
    return [sum(w * d[i] for w, d in zip(weights, deltas, strict=True)) for i in range(len(deltas[0]))]


def trimmed(delta, density):
    """The largest int(density · n) by magnitude, at least one, zero elsewhere (TIES, step 1)."""
    kept = sorted(range(len(delta)), key=lambda i: -abs(delta[i]))[: max(1, int(density * len(delta)))]
    return [delta[i] if i in kept else 0.0 for i in range(len(delta))]


def elected(deltas, weights):
    """The sign of the sum, then the mean over those that have it (TIES, steps 2 and 3)."""
    merged_vector = []
    for column in zip(*deltas, strict=True):
        sign = 1.0 if sum(column) >= 0 else -1.0
        chosen = [len(weights) * w * v for w, v in zip(weights, column, strict=True) if v * sign > 0]
        merged_vector.append(sum(chosen) / len(chosen) if chosen else 0.0)
    return merged_vector


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_task_arithmetic_adds_the_weighted_steps(tmp_path, scale):
    found = merged(tmp_path, EXPERTS, WEIGHTS, tensors(9), method="task_arithmetic", scale=scale)
    check(found, lambda name: weighted(vectors(name), WEIGHTS), scale)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS])
def test_ties_trims_elects_and_averages_what_agrees(tmp_path, density, weights):
    found = merged(tmp_path, EXPERTS, weights, tensors(9), method="ties", density=density, scale=1.5)
    check(found, lambda name: elected([trimmed(v, density) for v in vectors(name)], weights), 1.5)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.3, 0.5, 0.999])
def test_ties_of_steps_of_few_sizes_keeps_the_very_share_over_blocks(tmp_path, monkeypatch, density):
    monkeypatch.setattr(methods, "BLOCK", 16)
    start = {"w": torch.zeros(100)}
    step = torch.randint(-3, 4, (100,), generator=torch.Generator().manual_seed(3)).float()
    found = merged(tmp_path, [{"w": step}], [1.0], start, method="ties", density=density)["w"]
    assert found.tolist() == trimmed(step.tolist(), density)
    peft = merge_utils().prune(step, max(density, 0.01), method="magnitude")
    assert float(found.abs().sum()) == float(peft.abs().sum())


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_a_tensor_without_elements_stays_one(tmp_path, method):
    start = {"w": torch.ones(4), "none": torch.zeros(0, 3)}
    found = merged(tmp_path, [start], [1.0], start, method=method, density=0.5)
    assert found["none"].shape == (0, 3)


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_ties_does_not_trim_a_nan_away(tmp_path, density):
    broken = {**EXPERTS[1], "b.bias": torch.tensor([0.0] * 6 + [torch.nan])}
    with pytest.raises(Mistake, match=r"b\.bias: expert 1 holds a NaN"):
        merged(tmp_path, [EXPERTS[0], broken], [0.5, 0.5], tensors(9), method="ties", density=density)


def test_with_equal_weights_ties_is_the_plain_mean_of_its_paper(tmp_path):
    found = merged(tmp_path, EXPERTS, [1 / 3] * 3, tensors(9), method="ties", density=1.0)

    def paper(name):
        columns = zip(*vectors(name), strict=True)
        return [np.mean([v for v in column if v * (1 if sum(column) >= 0 else -1) > 0]) for column in columns]

    check(found, paper)


def dropped(found, scale=1.0):
    """The masks that a merge of one expert shows: where its step was kept."""
    return {name: (found[name] - tensors(9)[name]).abs().flatten() > 1e-6 for name in NAMES}


def test_dare_linear_keeps_drawn_steps_and_rescales_them(tmp_path):
    alone = [merged(tmp_path, EXPERTS, one, tensors(9), method="dare_linear", density=0.5, seed=4)
             for one in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]  # fmt: skip
    masks = [dropped(found) for found in alone]
    assert 0 < sum(int(mask["a.weight"].sum()) for mask in masks) < 45

    def expected(name):
        kept = [[v * bool(m) / 0.5 for v, m in zip(delta, mask[name], strict=True)]
                for delta, mask in zip(vectors(name), masks, strict=True)]  # fmt: skip
        return weighted(kept, WEIGHTS)

    check(merged(tmp_path, EXPERTS, WEIGHTS, tensors(9), method="dare_linear", density=0.5, seed=4), expected)


def test_dare_ties_elects_over_the_same_draws(tmp_path):
    alone = [merged(tmp_path, EXPERTS, one, tensors(9), method="dare_linear", density=0.5, seed=4)
             for one in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]  # fmt: skip
    masks = [dropped(found) for found in alone]

    def expected(name):
        kept = [[v * bool(m) / 0.5 for v, m in zip(delta, mask[name], strict=True)]
                for delta, mask in zip(vectors(name), masks, strict=True)]  # fmt: skip
        return elected(kept, WEIGHTS)

    check(merged(tmp_path, EXPERTS, WEIGHTS, tensors(9), method="dare_ties", density=0.5, seed=4), expected)


def test_dare_keeps_the_share_and_the_mean_of_a_step(tmp_path):
    start, given = {"w": torch.zeros(200_000)}, {"w": torch.ones(200_000)}
    found = merged(tmp_path, [given], [1.0], start, method="dare_linear", density=0.2)["w"]
    assert sorted(found.unique().tolist()) == [0.0, 5.0]
    assert float(found.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(0.2 * 0.8 / 200_000) / 0.2)


def test_what_dare_drops_hangs_on_seed_and_names_not_on_any_order(tmp_path):
    options = {"method": "dare_linear", "density": 0.5}
    first = merged(tmp_path, EXPERTS, WEIGHTS, tensors(9), seed=1, **options)
    again = merged(tmp_path, EXPERTS, WEIGHTS, tensors(9), seed=1, **options)
    other = merged(tmp_path, EXPERTS, WEIGHTS, tensors(9), seed=2, **options)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["a.weight"], other["a.weight"])
    fewer = [{"a.weight": expert["a.weight"]} for expert in EXPERTS]  # the same tensor, drawn first
    alone = merged(tmp_path, fewer, WEIGHTS, {"a.weight": tensors(9)["a.weight"]}, seed=1, **options)
    assert torch.equal(alone["a.weight"], first["a.weight"])


def test_dare_leaves_the_generator_of_others_alone(tmp_path):
    start = tensors(9)
    torch.manual_seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    merged(tmp_path, EXPERTS, WEIGHTS, start, method="dare_linear")
    assert torch.equal(torch.rand(1), drawn)


def test_the_order_of_the_experts_changes_no_draw(tmp_path):
    contents = {"math": (1.0, EXPERTS[0]), "code": (3.0, EXPERTS[1])}
    found = []
    for order in (("math", "code"), ("code", "math")):
        path = tmp_path / order[0]
        job = run_folder(path, {n: contents[n] for n in order}, tensors(9), method="dare_linear", density=0.5)
        run(job, World(), NoStop())
        found.append(load_file(job.output / "student" / "model.safetensors"))
    torch.testing.assert_close(found[0]["a.weight"], found[1]["a.weight"], rtol=1e-6, atol=1e-7)


def turned(first, second, t):
    """Shoemake's formula."""
    a, b = np.array(first), np.array(second)
    angle = math.acos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_turns_one_step_to_the_other(tmp_path, t):
    found = merged(tmp_path, EXPERTS[:2], [1 - t, t], tensors(9), method="slerp")
    check(found, lambda name: turned(*vectors(name)[:2], t))


def test_slerp_keeps_the_length_of_steps_of_one_length(tmp_path):
    start = {"w": torch.zeros(2)}
    given = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]
    found = merged(tmp_path, given, [0.5, 0.5], start, method="slerp")["w"]
    torch.testing.assert_close(found, torch.full((2,), math.sqrt(0.5)))


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_slerp_of_steps_along_one_line_is_their_mean(tmp_path, factor):
    start = {"w": torch.zeros(3)}
    given = [{"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": factor * torch.tensor([1.0, 2.0, 3.0])}]
    found = merged(tmp_path, given, [0.25, 0.75], start, method="slerp")["w"]
    torch.testing.assert_close(found, (0.25 + 0.75 * factor) * given[0]["w"])


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_of_other_than_two_experts_is_refused(tmp_path, count):
    with pytest.raises(Mistake, match=f"expected 2 experts, got {count}"):
        merged(tmp_path, EXPERTS[:count], [1 / count] * count, tensors(9), method="slerp")


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_a_single_expert_at_full_density_is_itself(tmp_path, method):
    found = merged(tmp_path, EXPERTS[:1], [1.0], tensors(9), method=method, density=1.0)
    check(found, lambda name: vectors(name)[0])
    assert torch.equal(found["steps"], torch.arange(4))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"])
def test_an_expert_of_weight_zero_takes_no_part_and_brings_no_nan(tmp_path, method):
    broken = {**EXPERTS[1], "b.bias": torch.full((7,), torch.nan)}
    found = merged(tmp_path, [EXPERTS[0], broken], [1.0, 0.0], tensors(9), method=method, density=1.0)
    check(found, lambda name: vectors(name)[0])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_a_nan_is_told_with_its_expert_under_every_method(tmp_path, method):
    broken = {**EXPERTS[1], "b.bias": torch.full((7,), torch.nan)}
    with pytest.raises(Mistake, match=r"b\.bias: expert 1 holds a NaN"):
        merged(tmp_path, [EXPERTS[0], broken], [0.5, 0.5], tensors(9), method=method)


def test_a_nan_in_the_start_is_told(tmp_path):
    start = {**tensors(9), "b.bias": torch.full((7,), torch.inf)}
    with pytest.raises(Mistake, match=r"b\.bias: the student that the experts started from"):
        merged(tmp_path, EXPERTS, WEIGHTS, start, method="task_arithmetic")


def test_the_start_may_be_of_another_type_and_has_to_have_the_same_tensors(tmp_path):
    start = {name: value.bfloat16() if name in NAMES else value for name, value in tensors(9).items()}
    experts = [{n: start[n].float() + 0.1 * tensors(s)[n] if n in NAMES else start[n] for n in start} for s in (1, 2)]
    found = merged(tmp_path, experts, [0.5, 0.5], start, method="task_arithmetic")
    torch.testing.assert_close(found["a.weight"], (experts[0]["a.weight"] + experts[1]["a.weight"]) / 2)
    assert found["a.weight"].dtype == torch.float32
    folders = [model_folder(tmp_path / f"x{i}", e) for i, e in enumerate(experts)]
    with pytest.raises(Mistake, match=r"tensor b\.bias stands only in .*x0"):
        merge(tmp_path / "m", folders, [0.5, 0.5], model_folder(tmp_path / "x", {"a.weight": start["a.weight"]}),
              method="ties")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_formed_in_float32_or_wider_and_rounded_once(tmp_path, dtype):
    kinds = {name: dtype if name in NAMES else torch.int64 for name in tensors(9)}
    start = {name: value.to(kinds[name]) for name, value in tensors(9).items()}
    experts = [{name: value.to(kinds[name]) for name, value in step(seed).items()} for seed in (1, 2)]
    found = merged(tmp_path, experts, [0.5, 0.5], start, method="task_arithmetic")["a.weight"]
    exact = (experts[0]["a.weight"].double() + experts[1]["a.weight"].double()) / 2
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-9)


def test_blocks_do_not_show(tmp_path, monkeypatch):
    start, given = {"w": torch.randn(1000)}, [{"w": torch.randn(1000)} for _ in range(2)]
    for method in ("task_arithmetic", "ties", "slerp"):  # DARE draws by the block
        whole = merged(tmp_path, given, [0.4, 0.6], start, method=method)["w"]
        monkeypatch.setattr("xlstm_distill.merge.methods.BLOCK", 64)
        torch.testing.assert_close(merged(tmp_path, given, [0.4, 0.6], start, method=method)["w"], whole)
        monkeypatch.undo()


@pytest.mark.slow
def test_pefts_functions_come_without_peft():
    assert callable(merge_utils().disjoint_merge)
    code = (
        "import sys; from xlstm_distill.merge.methods import merge_utils; merge_utils()\n"
        "print(any(name in sys.modules for name in ('peft', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_peft_is_told_in_one_line(monkeypatch):
    merge_utils.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Mistake, match="peft is not installed: pip install peft"):
        merge_utils()
