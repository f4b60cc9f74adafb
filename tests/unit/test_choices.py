"""The choices of `student.*` go from the settings into the student, and every one of them trains in both stages."""

from dataclasses import replace

import pytest
import torch
from model_support import tiny_student
from train_support import TOKENS_PER_STEP, job, make_config, make_run, run

from launcher.compose import compose
from launcher.plan import plan
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_file
from xlstm_distill.model import HybridConfig, HybridForCausalLM
from xlstm_distill.model.configuration import LARGEST_CAP
from xlstm_distill.train.students import student_choices

ABLATIONS = [
    {"use_gates": False, "use_window": False},
    {"use_window": False},
    {"sinks": 0},
    {"feature_map": "hedgehog", "feature_rope": "after", "gate_input": "qkv_rotated"},
    {"feature_rope": "none", "gate_input": "hidden"},
    {"reset_at_documents": True},
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("choices", ABLATIONS, ids=lambda choices: " ".join(choices))
def test_every_choice_trains_in_both_stages_and_leaves_idle_parameters_alone(jobs, tmp_path, choices):
    config = make_config(jobs.parent / "shards")
    short = {stage: replace(getattr(config, stage), tokens=3 * TOKENS_PER_STEP) for stage in ("align", "distill")}
    if choices.get("reset_at_documents"):  # the cached targets are of a teacher that looks across documents
        short["distill"] = replace(short["distill"], targets="online")
    config = replace(config, student=replace(config.student, **choices), **short)
    for name in ("fetch", "cache"):
        (tmp_path / name).symlink_to(jobs / name, target_is_directory=True)
    aligned = job(tmp_path, "align", config, inputs=("fetch",))
    facts = run(aligned)
    assert sum(facts["error_after"]) < sum(facts["error_before"])
    aligned.finish({})
    expert = job(tmp_path, "distill-math", config, "distill", inputs=("fetch", "align", "cache"), expert="math")
    run(expert)
    start, after = (
        HybridForCausalLM.from_pretrained(place) for place in (aligned.output / "initial", expert.output / "student")
    )
    assert {name: getattr(after.config, name) for name in choices} == choices
    idle, first = after.idle_parameters(), start.state_dict()
    for name, parameter in after.named_parameters():
        if name in after.mixer_parameters():
            assert parameter.equal(first[name]) == (name in idle), name


def test_a_student_made_with_another_reset_is_refused_in_one_line(jobs, tmp_path):
    config = make_config(jobs.parent / "shards")
    student = replace(config.student, reset_at_documents=True, init_from=str(jobs / "align/output/student"))
    (tmp_path / "fetch").symlink_to(jobs / "fetch", target_is_directory=True)
    wrong = job(tmp_path, "distill-math", replace(config, student=student), "distill", inputs=("fetch",), expert="math")
    with pytest.raises(Mistake, match=r"student.reset_at_documents=true: the student in .* was made with false"):
        run(wrong)


def test_of_a_student_that_was_given_the_facts_have_the_hashes(jobs, tmp_path):
    given = jobs / "align/output/student"
    config = make_config(jobs.parent / "shards")
    config = replace(
        config,
        student=replace(config.student, init_from=str(given)),
        distill=replace(config.distill, tokens=TOKENS_PER_STEP),
    )
    for name in ("fetch", "cache"):
        (tmp_path / name).symlink_to(jobs / name, target_is_directory=True)
    facts = run(job(tmp_path, "distill-math", config, "distill", inputs=("fetch", "cache"), expert="math"))
    assert facts["started_from"] == {file.name: hash_file(file) for file in given.glob("*.safetensors")} != {}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("hybrid", {"sinks": 4, "use_window": True, "use_gates": True, "feature_map": "softmax"}),
        ("mlstm-window", {"sinks": 0, "use_window": True, "use_gates": True}),
        ("mlstm", {"use_window": False, "use_gates": True}),
        ("linear-attention", {"use_window": False, "use_gates": False}),
        ("hedgehog", {"sinks": 4, "feature_map": "hedgehog"}),
    ],
)
def test_the_ready_made_students_are_the_papers_ablations(name, wanted):
    config = compose([f"student={name}"]).config
    choices = student_choices(config, 2)
    assert {key: choices[key] for key in wanted} == wanted
    base = {"model_type": "llama"}
    made = HybridConfig(base, **choices)
    assert all(getattr(made, key) == (list(v) if isinstance(v, tuple) else v) for key, v in choices.items())


def test_forget_gates_start_where_they_are_told(tmp_path):
    _, student = tiny_student(tmp_path, forget_gate_bias=[1.0, 4.0], random=False)
    for mixer in student.mixers:
        assert mixer.forget_gate.bias.tolist() == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(Mistake, match=r"student\.forget_gate_bias=\[3\.0\]: expected two numbers, as \[3\.0,6\.0\]"):
        compose(["student.forget_gate_bias=[3.0]"])
    with pytest.raises(ValueError, match="expected the first head's and the last one's"):
        HybridConfig({"model_type": "llama"}, forget_gate_bias=[3.0])


def test_windows_of_layers_are_named_by_number():
    one_by_one = ["student.layer_windows.1=64", "student.layer_windows.3=128"]
    for given in (one_by_one, ["student.layer_windows={1:64,3:128}"]):
        config = compose([*given, "student.window=8"]).config
        assert config.student.windows(5) == student_choices(config, 5)["layer_windows"] == [8, 64, 8, 128, 8]


def test_a_layer_that_there_is_not_or_a_window_that_cannot_be_is_refused():
    for setting, said in (
        ("30=4", r"student\.layer_windows\.30: expected a layer from 0 to 29"),
        ("x=4", r"student\.layer_windows\.x: expected a layer from 0 to 29"),
        ("3=0", r"student\.layer_windows\.3=0: expected 1 or more"),
    ):
        with pytest.raises(Mistake, match=said):
            compose([f"student.layer_windows.{setting}", "teacher=smollm2-135m"])
    with pytest.raises(Mistake, match=r"student\.layer_windows\.2: expected a layer from 0 to 1"):
        student_choices(compose(["student.layer_windows.2=9", "teacher.num_hidden_layers=0"]).config, 2)


def test_windows_of_layers_are_part_of_what_an_alignment_is():
    one, other = (
        plan(compose(["stage=align", *more]).config)["align"].identity for more in ([], ["student.layer_windows.2=64"])
    )
    assert dict(other) == {**one, "student.layer_windows.2": 64}


def test_documents_matter_where_the_student_resets(jobs):
    folder = jobs / "align/output/student"
    apart, joined = (HybridForCausalLM.from_pretrained(folder, reset_at_documents=reset) for reset in (True, False))
    ids, documents = torch.arange(3, 15)[None], torch.arange(12)[None] // 6
    assert joined(ids, document_ids=documents).logits.equal(joined(ids).logits)
    assert not apart(ids, document_ids=documents).logits.equal(apart(ids).logits)


def test_launcher_and_student_allow_the_same_soft_cap():
    assert compose([f"student.input_gate_soft_cap={LARGEST_CAP}"]).config.student.input_gate_soft_cap == LARGEST_CAP
    with pytest.raises(Mistake, match="input_gate_soft_cap"):
        compose([f"student.input_gate_soft_cap={LARGEST_CAP + 1}"])
