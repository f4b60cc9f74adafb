"""The paper's suites as lm-eval has them, and how its tasks are asked and judged here, with made-up data sets."""

import json
import random
from pathlib import Path

import datasets
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks._yaml_loader import load_yaml

from launcher.compose import compose
from xlstm_distill.contract.data import data_folder
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.tasks import runs_code
from xlstm_distill.evaluate import suites
from xlstm_distill.evaluate.domains import OTHER, by_name
from xlstm_distill.evaluate.lm import run_task
from xlstm_distill.evaluate.suites import ABSENT, OURS, Asked, check_tasks, find

PAPER = {  # §4 and App. D: task → (shots, tokens of an answer)
    "paper-base": {
        "piqa": (0, 0), "arc_easy": (0, 0), "arc_challenge": (25, 0), "hellaswag": (10, 0), "winogrande": (5, 0),
        "mmlu": (5, 0), "gpqa_diamond_cot_zeroshot": (0, 2048), "gpqa_main_cot_zeroshot": (0, 2048), "gsm8k": (8, 1024),
        "humaneval": (0, 1024), "humaneval_plus": (0, 1024), "mbpp": (3, 256), "mbpp_plus": (3, 1024),
    },
    "paper-instruct": {
        "piqa": (0, 0), "arc_easy": (0, 0), "arc_challenge": (25, 0), "hellaswag": (10, 0), "winogrande": (5, 0),
        "mmlu": (5, 0), "gpqa_diamond_cot_zeroshot": (0, 2048), "gpqa_main_cot_zeroshot": (0, 2048),
        "gsm8k_cot": (5, 3072), "hendrycks_math500": (0, 3072), "hendrycks_math": (0, 3072),
        "leaderboard_math_hard": (4, 1024), "humaneval_instruct": (0, 3072), "humaneval_plus_instruct": (0, 3072),
        "mbpp_instruct": (3, 1024), "mbpp_plus_instruct_shots": (3, 1024), "cruxeval_output": (0, 3072),
        "cruxeval_input": (2, 3072), "ifeval": (None, 0),
    },
}  # fmt: skip


class Scripted(LM):
    """Answers as it is told, and remembers what it was asked."""

    tokenizer_name = "scripted"

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [(self.answer(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise AssertionError

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history)

    def chat_template(self, chat_template=False):
        return "a template"


@pytest.fixture
def data_sets(monkeypatch):
    """Path of a data set → its rows, which stand in every split."""
    rows = {}

    def load_dataset(path, name=None, **options):
        found = datasets.Dataset.from_list(rows[path])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), found))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return rows


def suite(name):
    return yaml.safe_load((data_folder("configs") / f"eval/{name}.yaml").read_text())


@pytest.mark.parametrize("name", PAPER)
def test_a_suite_asks_what_the_paper_asks(name):
    settings = suite(name)
    found = {task: (settings["shots"].get(task), settings["max_new_tokens"].get(task, 0)) for task in settings["tasks"]}
    assert found == PAPER[name]
    assert settings.get("chat", False) == (name == "paper-instruct")
    assert set(ABSENT) == {"MT-Bench"}


@pytest.mark.parametrize("name", PAPER)
def test_every_task_of_a_suite_is_one_of_the_installed_harness(name):
    for task in PAPER[name]:
        file = find(OURS.get(task, (task, {}))[0])
        assert file is not None, task
        found = load_yaml(file, resolve_func=False)
        assert (found.get("task") if isinstance(found.get("task"), str) else found["group"]) == OURS.get(task, (task,))[
            0
        ]
        assert task not in OURS or find(task) is None


def test_what_runs_code_is_what_the_harness_calls_unsafe():
    for task in {**PAPER["paper-base"], **PAPER["paper-instruct"]}:
        found = load_yaml(find(OURS.get(task, (task, {}))[0]), resolve_func=False)
        assert runs_code(task) == bool(found.get("unsafe_code")), task


def test_a_misspelt_task_and_code_without_leave_are_refused_before_anything_is_loaded():
    with pytest.raises(Mistake, match="gsm9k: neither a local task nor one of lm-eval's"):
        check_tasks(["gsm9k"], False)
    with pytest.raises(Mistake, match=r"allow it with eval\.allow_code_execution=true, or leave the task out"):
        check_tasks(["piqa", "humaneval"], False)
    check_tasks(["piqa", "local_recall"], False)


def test_a_launch_with_code_and_without_leave_is_refused_and_other_stages_are_not():
    from launcher.checks import unasked_code

    config = compose(["teacher=llama-3.1-8b"]).config
    (line,) = unasked_code(config, ["eval"])
    assert line.startswith("eval.tasks: humaneval, humaneval_plus, mbpp, mbpp_plus: run programs")
    assert not list(unasked_code(config, ["align", "distill"]))
    allowed = compose(["teacher=llama-3.1-8b", "eval.allow_code_execution=true"]).config
    assert not list(unasked_code(allowed, ["eval"]))
    searched = compose(["merge.search=2", "merge.tasks=[mbpp,piqa]"]).config
    (line,) = unasked_code(searched, ["merge", "eval"])
    assert line.startswith("merge.tasks: mbpp: run programs")


HUMAN = {"task_id": "H/0", "prompt": "def add(a, b):\n", "entry_point": "add", "canonical_solution": "",
         "test": "def check(f):\n    assert f(2, 3) == 5\n"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "score"), [("    return a + b", 1.0), ("    return a * b", 0.0), ("    exit(0)", 0.0)]
)
def test_humaneval_runs_in_the_sandbox_and_asks_no_hub_for_its_metric(data_sets, body, score):
    data_sets["openai/openai_humaneval"] = [HUMAN]
    lm = Scripted(lambda prompt: body)
    result = run_task(lm, Asked("humaneval", shots=0, max_new_tokens=77, code=True), Path())
    assert (result.score["score"], result.score["metric"]) == (score, "pass@1,create_test")
    assert [(sample["id"], sample["score"]) for sample in result.samples] == [("0", score)]
    assert lm.asked[0][1]["max_gen_toks"] == 77


def test_code_that_may_not_run_is_not_even_loaded():
    with pytest.raises(Mistake, match=r"see eval\.allow_code_execution"):
        suites.load(Asked("humaneval"), Path())


@pytest.mark.slow
def test_humaneval_plus_instruct_is_ours_under_its_own_name(data_sets):
    data_sets["evalplus/humanevalplus"] = [HUMAN]
    lm = Scripted(lambda prompt: "    return a + b\n```")
    result = run_task(lm, Asked("humaneval_plus_instruct", shots=0, chat=True, code=True), Path())
    assert result.score["score"] == 1.0
    assert list(result.results["results"]) == ["humaneval_plus_instruct"]
    assert lm.asked[0][0].startswith("<user>Write a solution")


@pytest.mark.slow
def test_mbpp_plus_has_examples_whose_answers_are_programs(data_sets):
    tests = ["assert f(1) == 2", "assert f(2) == 3", "assert f(0) == 1"]
    data_sets["evalplus/mbppplus"] = [{"prompt": "Add one.", "test_list": tests, "code": "", "text": ""}]
    lm = Scripted(lambda prompt: "def f(x):\n    return x + 1\n```")
    result = run_task(lm, Asked("mbpp_plus_instruct_shots", shots=3, chat=True, code=True), Path())
    assert result.score["score"] == 1.0
    prompt = lm.asked[0][0]
    assert prompt.count("<assistant>") == 4
    assert prompt.count("def similar_elements") == 1
    lm = Scripted(lambda prompt: "def f(x):\n    return 3 if x == 2 else x * 2\n```")  # the third assertion fails
    assert run_task(lm, Asked("mbpp_plus_instruct_shots", shots=3, chat=True, code=True), Path()).score["score"] == 0.0


@pytest.mark.slow
def test_cruxeval_counts_the_share_of_its_ten_answers_that_hold(data_sets):
    item = {"code": "def f(n):\n    return n + 1", "input": "16", "output": "17", "id": "0"}
    data_sets["cruxeval-org/cruxeval"] = [item]
    answers = iter(["[ANSWER]\nassert f(16) == 17\n", "17", *["18"] * 8])
    lm = Scripted(lambda prompt: next(answers))
    result = run_task(lm, Asked("cruxeval_output", shots=0, code=True), Path())
    assert result.score["score"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "answer", ["{}", "{}\n```\nThat is all.", "Here it is:\n```python\n{}\n```\nThat is all.", "\n{}\n```"]
)
def test_the_program_in_an_answer_keeps_its_first_word(answer):
    program = "def f(x):\n    return x"
    ((found,),) = suites._programs([[answer.format(program)]], None)
    assert found.strip() == program


@pytest.mark.slow
def test_gsm8k_is_judged_by_what_the_answer_means(data_sets):
    data_sets["openai/gsm8k"] = [{"question": f"{n}?", "answer": f"It is so.\n#### {n},000"} for n in range(1, 5)]
    answers = {"1?": "1000 dollars.", "2?": "The answer is 2,000.", "3?": "#### 3000.00", "4?": "It is 5."}
    lm = Scripted(lambda prompt: answers[prompt.rsplit("Question: ", 1)[1].split("\n")[0]])
    result = run_task(lm, Asked("gsm8k", shots=2, max_new_tokens=9), Path())
    assert result.score["score"] == 0.75
    assert result.score["metric"] == "exact_match,none"
    assert [sample["score"] for sample in result.samples] == [1, 1, 1, 0]
    assert lm.asked[0][0].count("####") == 2


@pytest.mark.slow
def test_answers_that_are_voted_on_keep_their_vote():
    assert suites._overrides(Asked("gsm8k_cot_self_consistency"), "gsm8k_cot_self_consistency", {}) == {}


def test_the_order_of_choices_hangs_on_the_seed_alone(data_sets):
    wrong = {f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)}
    data_sets["Idavidrein/gpqa"] = [{"Question": f"q{i}", "Correct Answer": "yes", **wrong} for i in range(8)]

    def choices(before, seed):
        random.seed(before)
        task = suites.load(Asked("gpqa_main_zeroshot", seed=seed), Path())
        return [[doc[f"choice{n}"] for n in (1, 2, 3, 4)] for doc in task.eval_docs]

    assert choices(1, seed=5) == choices(2, seed=5) != choices(2, seed=6)


def test_every_task_of_the_papers_suites_has_a_domain():
    tasks = [task for name in ("paper-base", "paper-instruct") for task in suite(name)["tasks"]]
    assert [task for task in tasks if by_name(task) == OTHER] == []


@pytest.mark.slow
def test_a_group_is_one_score_with_all_items_of_its_members(data_sets):
    solution = "So it is $\\boxed{\\frac{1}{2}}$."
    problem = {"problem": "p", "level": "Level 5", "type": "t", "solution": solution}
    data_sets["EleutherAI/hendrycks_math"] = [problem, {**problem, "problem": "q"}]
    lm = Scripted(lambda prompt: "It is 0.5" if "p" in prompt.split("Problem:")[-1].split("\n")[0] else "It is 2.")
    result = run_task(lm, Asked("hendrycks_math", shots=0), Path())
    assert result.score["score"] == 0.5
    assert result.score["items"] == len(result.samples) == 14
    assert result.samples[0]["id"] == "hendrycks_math_algebra/0"
    json.dumps(result.results)


@pytest.mark.slow
def test_math_l5_takes_level_five_only_and_four_examples(data_sets):
    row = {"problem": "p", "type": "t", "solution": "$\\boxed{7}$"}
    data_sets["DigitalLearningGmbH/MATH-lighteval"] = [{**row, "level": "Level 5"}, {**row, "level": "Level 4"}]
    lm = Scripted(lambda prompt: "Therefore $7$.")
    result = run_task(lm, Asked("leaderboard_math_hard", shots=4, max_new_tokens=1024), Path())
    assert (result.score["score"], result.score["items"]) == (1.0, 7)
    assert lm.asked[0][0].count("I hope it is correct") == 4


@pytest.mark.slow
def test_shots_replace_those_of_the_task(data_sets):
    data_sets["allenai/ai2_arc"] = [
        {
            "id": "1",
            "question": f"Which of {n}?",
            "choices": {"text": ["ab", "c"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for n in range(6)
    ]
    lm = Scripted(lambda context, choice: -len(choice))
    result = run_task(lm, Asked("arc_challenge", shots=3, limit=2), Path())
    assert lm.asked[0][0].count("Question:") == 4
    assert result.results["n-shot"] == {"arc_challenge": 3}
    assert (result.score["metric"], result.score["items"], result.score["score"]) == ("acc_norm,none", 2, 1.0)


def test_a_tag_names_its_tasks(data_sets):
    data_sets["allenai/ai2_arc"] = [
        {"id": "1", "question": "?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}
    ]
    with pytest.raises(Mistake, match="ai2_arc: neither a local task nor one of lm-eval's"):
        suites.load(Asked("ai2_arc"), Path())
