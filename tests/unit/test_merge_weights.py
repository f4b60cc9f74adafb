"""λ by expert and by part of the student."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from merge_support import NoStop, merged, run_folder, tensors

from launcher.checks import problems
from launcher.compose import compose
from launcher.plan import plan
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import World
from xlstm_distill.contract.parts import KINDS, part_of, problem_of
from xlstm_distill.contract.schema import Merge
from xlstm_distill.merge.stage import run
from xlstm_distill.merge.weights import TensorWeights, scale_weights

LAYER = "model.layers.{}.self_attn."
STUDENT = [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    *(f"model.layers.{i}.{name}" for i in range(12) for name in (
        "self_attn.q_proj.weight", "self_attn.o_proj.bias", "self_attn.query_map", "self_attn.input_gate.weight",
        "self_attn.output_gate.bias", "self_attn.q_norm.weight", "mlp.gate_proj.weight", "input_layernorm.weight",
    )),
]  # fmt: skip


def test_weights_are_scaled_to_sum_to_one_and_bad_ones_refused():
    assert scale_weights({"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(Mistake, match=rf"the weight of expert b is {bad}; expected a number ≥ 0"):
            scale_weights({"a": 1.0, "b": bad})
    with pytest.raises(Mistake, match="the weights of a, b are all zero"):
        scale_weights({"a": 0.0, "b": 0.0})


def test_every_parameter_of_a_student_is_of_one_kind(tmp_path):
    from model_support import FAMILIES, tiny_student

    for family in FAMILIES:
        _, student = tiny_student(tmp_path / family, family)
        for name in student.state_dict():
            assert sum(part_of(name, [kind]) == kind for kind in KINDS) == 1, name
        gates = {name for name in student.mixer_parameters() if part_of(name, ["gates", "feature_maps"])}
        assert gates == set(student.mixer_parameters())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (LAYER.format(3) + "forget_gate.bias", "gates"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp"),
        (LAYER.format(3) + "key_map", "feature_maps"),
        (LAYER.format(3) + "k_proj.weight", "projections"),
        ("model.embed_tokens.weight", "embeddings"),
        ("model.norm.weight", "norms"),
    ],
)
def test_gates_are_apart_from_projections(name, part):
    assert part_of(name, KINDS) == part


def test_a_kind_wins_over_layers_and_layers_over_the_default():
    weights = TensorWeights({"math": 1.0, "code": 1.0}, {"code": {"gates": 3.0, "0-9": 0.0, "10": 4.0}})
    weights.check(STUDENT)
    assert weights[LAYER.format(2) + "input_gate.weight"] == {"math": 0.25, "code": 0.75}
    assert weights[LAYER.format(2) + "q_proj.weight"] == {"math": 1.0, "code": 0.0}
    assert weights[LAYER.format(10) + "q_proj.weight"] == {"math": 0.2, "code": 0.8}
    assert weights[LAYER.format(11) + "q_proj.weight"] == weights["lm_head.weight"] == {"math": 0.5, "code": 0.5}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"gate": 0.1}, "gate: no such part; the nearest is gates"),
        ({"layers.0-9": 0.1}, "layers.0-9: no such part"),
        ({"5-3": 0.1}, "5-3: expected layers from 0 to 11"),
        ({"12": 0.1}, "12: expected layers from 0 to 11, as 7 or 0-9"),
        ({"0-3": 0.1, "3": 0.2}, "3: another part names a layer of it too"),
        ({"mlp": -0.1}, "mlp=-0.1: expected a number ≥ 0"),
        ({"mlp": float("nan")}, "mlp=nan: expected"),
    ],
)
def test_a_bad_part_is_named(parts, said):
    assert problem_of(parts, 12).startswith(said)
    with pytest.raises(Mistake, match="merge.weights.code." + said.split(";")[0].replace(".", r"\.")):
        TensorWeights({"math": 1.0, "code": 1.0}, {"code": parts}).check(STUDENT)


def test_a_part_that_the_student_does_not_have_is_refused():
    with pytest.raises(Mistake, match=r"merge\.weights\.code\.gates: the student has no tensor of that part"):
        TensorWeights({"code": 1.0}, {"code": {"gates": 1.0}}).check(["model.norm.weight"])


def test_all_weights_of_a_part_zero_are_refused_with_a_tensor_of_it():
    weights = TensorWeights({"math": 1.0, "code": 0.0}, {"math": {"norms": 0.0}})
    with pytest.raises(Mistake, match=r"the weights of math, code for model\.norm\.weight are all zero"):
        weights.check(STUDENT)


def test_parts_are_merged_by_their_own_weights(tmp_path):
    names = [
        LAYER.format(0) + "q_proj.weight",
        LAYER.format(0) + "input_gate.weight",
        LAYER.format(1) + "q_proj.weight",
    ]
    given = [{name: torch.full((2,), float(i)) for name in names} for i in range(2)]
    found = merged(tmp_path, given, [1.0, 1.0], parts={"1": {"gates": 3.0, "1": 9.0}})
    assert [found[name][0].item() for name in names] == pytest.approx([0.5, 0.75, 0.9])


def test_all_weights_zero_are_refused_by_the_stage(tmp_path):
    job = run_folder(tmp_path, {"math": (0.0, tensors(0)), "code": (0.0, tensors(1))})
    with pytest.raises(Mistake, match="the weights of math, code are all zero"):
        run(job, World(), NoStop())
    assert list(job.output.iterdir()) == []


def test_a_weight_for_an_expert_that_is_not_merged_is_refused(tmp_path):
    job = run_folder(tmp_path, {"math": (1.0, tensors(0))}, weights={"cod": {"mlp": 1.0}})
    with pytest.raises(Mistake, match=r"merge\.weights\.cod: no such expert is merged; there are math"):
        run(job, World(), NoStop())


def said(*settings):
    try:
        compose(["stage=merge", *settings])
    except Mistake as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["merge.weights.cod.gates=1"],
            "merge.weights.cod: no such expert is merged; the nearest is code (all: math, c",
        ),
        (["merge.weights.code.gate=1"], "merge.weights.code.gate: no such part; the nearest is gates"),
        (["merge.weights.code={0-30: 1}"], "merge.weights.code.0-30: expected layers from 0 to 29, as 7 or 0-9"),
        (["merge.density=0"], "merge.density=0.0: expected more than 0"),
        (["merge.density=1.1"], "merge.density=1.1: expected 0 to 1"),
        (["merge.scale=0"], "merge.scale=0.0: expected more than 0"),
        (["merge.search=-1"], "merge.search=-1: expected 0 or more"),
        (["merge.method=slerp", "experts=[math]"], "merge.method=slerp: turns one expert to another; expected 2 expe"),
        (["merge.search=2", "merge.methods=[ties,tie]"], "merge.methods=tie: not one of linear, task_arithmetic"),
        (["merge.search=2", "merge.weights.code.mlp=1"], "merge.weights: merge.search finds the weights"),
        (["merge.search=4", "experts=[math]"], "merge.search=4: there is one expert to merge; expected two or more"),
        (["merge.search=2000"], "merge.search=2000: 2001 candidates; expected at most 1000"),
        (["merge.weights={code: {gates: 0}, math: {gates: 0}}"], "merge.weights: gates is 0 for every expert"),
        (["merge.methods=[ties]"], "merge.methods: belong to a search; add merge.search=4"),
        (["merge.tasks=[piqa]"], "merge.tasks: belong to a search"),
        (["merge.search=2", "merge.tasks=[local_clozes]"], "merge.tasks=local_clozes: no such local task"),
        (["merge.search=2", "merge.tasks=[local_positions]"], "merge.tasks=local_positions_demo_math: no such local"),
        (["merge.method=mean"], "merge.method=mean: not one of linear"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_runs(settings, message):
    assert said(*settings).startswith(message)


def test_good_settings_are_taken():
    for settings in (["merge.weights.code={gates: 0.1, 0-9: 0.4}"], ["merge.method=slerp"], ["merge.density=1"],
                     ["merge.search=4", "merge.methods=[linear,ties]", "merge.tasks=[local_recall]"]):  # fmt: skip
        assert list(problems(compose(["stage=merge", *settings]).config)) == []


@cache
def demo():
    return compose(["stage=merge"]).config


def job_of(config=None, **settings):
    return plan(replace(config or demo(), merge=Merge(**settings)))["merge"]


def test_a_mean_reads_the_experts_alone_and_the_others_the_alignment_too():
    shards, start = (replace(demo(), data=replace(demo().data, shards="/x")),
                     replace(demo(), student=replace(demo().student, init_from="/x")))  # fmt: skip
    assert job_of().inputs == ("distill-math", "distill-code")
    assert job_of(method="ties").inputs == ("align", "distill-math", "distill-code")
    assert job_of(search=2).inputs == ("fetch", "tokenize", "distill-math", "distill-code")
    assert job_of(search=2, methods=("linear", "ties")).inputs[:3] == ("fetch", "tokenize", "align")
    assert job_of(shards, search=2).inputs == ("fetch", "distill-math", "distill-code")
    assert job_of(start, method="ties").inputs == ("distill-math", "distill-code")


def test_only_what_changes_a_merge_is_its_identity():
    plain = dict(job_of().identity)
    assert plain == {
        "merge.method": "linear", "expert.math.merge_weight": 0.5, "expert.code.merge_weight": 0.5,
        "experts": ["math", "code"],
    }  # fmt: skip
    assert dict(job_of(replace(demo(), seed=3), density=0.5, scale=2.0).identity) == plain
    more = dict(job_of(method="dare_ties", weights={"code": {"gates": 1.0}}).identity)
    assert {key: more[key] for key in more.keys() - plain.keys()} == {
        "merge.weights.code.gates": 1.0, "merge.density": 0.2, "merge.scale": 1.0, "seed": 0,
    }  # fmt: skip
    searched = dict(job_of(search=2, tasks=("local_recall",)).identity)
    assert searched.keys() == {
        "merge.search", "merge.methods", "merge.tasks", "eval.samples", "eval.limit", "experts"
    }  # fmt: skip
    few = replace(demo(), eval=replace(demo().eval, shots={"piqa": 2, "gsm8k": 4}, chat=True, max_new_tokens={"x": 9}))
    asked = dict(job_of(few, search=2, tasks=("piqa",)).identity)
    assert asked.keys() - searched.keys() == {"eval.shots.piqa", "eval.chat"}
    assert dict(job_of(few, search=2).identity).keys() == searched.keys() - {"eval.limit"}
