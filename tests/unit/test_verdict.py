"""The verdict: intervals of C_α, α* and recovery, per student, task and domain, and what merging changed."""

import json
import math

import numpy as np
import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Config, Eval, Expert, Source, Teacher
from xlstm_distill.evaluate import verdict_tables
from xlstm_distill.evaluate.board import Board, Score, Student, read_samples, score_of
from xlstm_distill.evaluate.bootstrap import SEED, draw_scores
from xlstm_distill.evaluate.domains import by_name, domains_of
from xlstm_distill.evaluate.verdict import ALL, Verdicts

RNG = np.random.default_rng(3)


def coins(count, share, prefix="q"):
    values = (RNG.random(count) < share).astype(float)
    return Score(float(values.mean()), None, {f"{prefix}{i}": v for i, v in enumerate(values)})


def plain(table, stderr=None):
    return {task: Score(value, stderr) for task, value in table.items()}


def board(teacher, students, **more):
    return Board(teacher, tuple(Student(name, scores, teacher) for name, scores in students.items()), **more)


def test_the_numbers_themselves_are_those_of_win_and_tie():
    teacher = plain({"a": 0.8, "b": 0.5, "c": 0.0, "d": 0.4})
    student = plain({"a": 0.6, "b": 0.5, "c": 0.1})
    verdicts = Verdicts(board(teacher, {"s": student}))
    found, comparison = verdicts.students["s"], verdicts.comparisons["s"]
    assert found.critical_tolerance.value == comparison.critical_tolerance == 0  # of ∞, .25, 0, 0
    assert found.rates[0.0].value == comparison.win_and_tie(0.0) == 0.5
    assert found.mean_recovery.value == comparison.mean_recovery == pytest.approx((0.75 + 1 + 0) / 3)
    assert {t: e.value for t, e in found.recovery.items()} == {"a": pytest.approx(0.75), "b": 1, "c": None, "d": 0}
    assert comparison.missing == ("d",)


def test_the_intervals_are_those_of_a_naive_loop_over_replicates():
    teacher = {task: coins(40, 0.8) for task in "abc"}
    student = {task: coins(40, 0.6) for task in "abc"}
    found = Verdicts(board(teacher, {"s": student}), replicates=200).students["s"]
    stars, means, by_task = [], [], []
    drawn = {task: draw_scores(task, {"s": student[task], "t": teacher[task]}, 200) for task in "abc"}
    for r in range(200):
        ratios = [drawn[task]["s"][r] / drawn[task]["t"][r] for task in "abc"]
        stars.append(sorted(max(0, 1 - x) for x in ratios)[1])
        means.append(sum(ratios) / 3)
    rng = np.random.default_rng(SEED)
    for _ in range(200):
        chosen = ["abc"[int(rng.integers(0, 3))] for _ in range(3)]
        by_task.append(sum(student[t].value / teacher[t].value for t in chosen) / 3)
    for replicates, ends in (
        (stars, found.critical_tolerance.samples),
        (means, found.mean_recovery.samples),
        (by_task, found.mean_recovery.tasks),
    ):
        ordered = sorted(replicates)
        assert list(ends) == pytest.approx([ordered[4], ordered[194]])  # the 5th and the 195th of 200


def test_a_paired_student_that_equals_its_teacher_has_no_spread():
    teacher = {"a": coins(40, 0.5), "b": coins(30, 0.7)}
    found = Verdicts(board(teacher, {"s": teacher})).students["s"]
    assert found.mean_recovery.samples == (1, 1)
    assert found.critical_tolerance.samples == (0, 0)
    assert found.rates[0.0].tasks == (1, 1)


def test_a_missing_score_is_lost_in_every_number_and_in_every_replicate():
    teacher = plain({"a": 0.5, "b": 0.5, "c": 0.5}, 0.01)
    verdicts = Verdicts(board(teacher, {"s": plain({"a": 0.5, "c": math.nan}, 0.01)}))
    found = verdicts.students["s"]
    assert found.critical_tolerance.value == math.inf
    assert found.critical_tolerance.samples == (math.inf, math.inf)
    assert found.rates[0.1].value == pytest.approx(1 / 3)
    assert found.mean_recovery.value == pytest.approx(1 / 3)
    assert "Without a score, counted as lost: s: b, c." in verdict_tables.notes(verdicts)
    assert verdict_tables.verdicts_json(verdicts)["s"]["critical_tolerance"] is None


def test_a_teacher_without_a_score_is_refused():
    with pytest.raises(Mistake, match="scores of teacher: b"):
        Verdicts(board(plain({"a": 1.0, "b": None}), {"s": plain({"a": 1.0})}))


def test_tasks_where_lower_is_better_stay_out():
    teacher = plain({"acc": 0.5, "ppl": 6.0})
    verdicts = Verdicts(board(teacher, {"s": plain({"acc": 0.5, "ppl": 60.0})}, lower=frozenset({"ppl"})))
    assert list(verdicts.students["s"].recovery) == ["acc"]
    assert verdicts.students["s"].mean_recovery.tasks is None  # of one task


EXPERTS = {
    "math": {"gsm8k": 0.80, "mbpp": 0.20},
    "code": {"gsm8k": 0.40, "mbpp": 0.60},
    "merged": {"gsm8k": 0.76, "mbpp": 0.63},
    "generalist": {"gsm8k": 0.60, "mbpp": 0.54},
}


@pytest.fixture(scope="module")
def merged():
    teacher = plain({"gsm8k": 0.8, "mbpp": 0.6}, 0.01)
    students = {name: plain(table, 0.01) for name, table in EXPERTS.items()}
    domain = {"gsm8k": "math", "mbpp": "code"}
    return Verdicts(board(teacher, students, domain=domain, experts=("math", "code"), unions=("generalist",)))


def test_what_merging_changed_is_told_per_domain_against_best_expert_own_expert_and_generalist(merged):
    found = {(c.domain, c.kind): (c.against, round(c.difference.value, 3), c.outcome) for c in merged.changes}
    assert found == {
        ("math", "best expert"): ("math", -0.05, "worse"),
        ("math", "own expert"): ("math", -0.05, "worse"),
        ("math", "generalist"): ("generalist", 0.2, "better"),
        ("code", "best expert"): ("code", 0.05, "better"),
        ("code", "own expert"): ("code", 0.05, "better"),
        ("code", "generalist"): ("generalist", 0.15, "better"),
        (ALL, "best expert"): ("code", round(1.0 - 0.75, 3), "better"),
        (ALL, "generalist"): ("generalist", 0.175, "better"),
    }


def test_the_table_has_one_line_for_merged_against_generalist_per_domain_with_its_interval(merged):
    _, rows = verdict_tables.change_table(merged)
    lines = {row[0]: row[1:] for row in rows}
    difference, samples, _, outcome = lines["math: merged against generalist"]
    assert (difference, outcome) == ("+0.200", "better")
    low, high = (float(end) for end in samples.strip("[]").split(", "))
    # √(.01² + .01²)/.8 = .0177, widened by the common teacher's .01/.8 of .2
    assert (low, high) == pytest.approx((0.2 - 1.96 * 0.0179, 0.2 + 1.96 * 0.0179), abs=0.004)
    assert "math: merged against math (best and own expert)" in lines


def test_a_difference_within_the_noise_is_undecided():
    teacher, a, b = plain({"x": 0.8}, 0.02), plain({"x": 0.7}, 0.05), plain({"x": 0.68}, 0.05)
    verdicts = Verdicts(board(teacher, {"merged": a, "math": b}, experts=("math",)))
    assert {change.outcome for change in verdicts.changes} == {"undecided"}


def test_without_a_merged_student_there_is_nothing_to_compare():
    verdicts = Verdicts(board(plain({"x": 0.8}), {"math": plain({"x": 0.7})}, experts=("math",)))
    assert verdicts.changes == []


def test_a_student_of_another_run_is_held_against_the_teacher_that_was_asked_the_same():
    teacher, other = plain({"x": 0.8, "y": 0.5}), plain({"x": 0.4})
    students = (Student("own", plain({"x": 0.4, "y": 0.5}), teacher), Student("o:merged", plain({"x": 0.4}), other))
    verdicts = Verdicts(Board(teacher, students))
    assert verdicts.students["own"].recovery["x"].value == 0.5
    assert verdicts.students["o:merged"].recovery["x"].value == 1
    assert verdicts.comparisons["o:merged"].missing == ("y",)
    assert any("o:merged is held against its own run's teacher" in line for line in verdict_tables.notes(verdicts))


def test_how_the_spread_is_known_is_said_unless_all_items_are_paired():
    teacher = {"p": coins(9, 0.5), "u": coins(9, 0.5), "n": Score(0.5, 0.1), "x": Score(0.5)}
    student = {**teacher, "u": coins(9, 0.5, "other")}
    verdicts = Verdicts(board(teacher, {"s": student}))
    assert verdicts.spread == {"p": "paired", "u": "unpaired", "n": "normal", "x": "none"}
    said = "\n".join(verdict_tables.notes(verdicts))
    assert "u: the models were not asked the same items" in said
    assert "n: no scores per item, so scores are drawn from a normal distribution" in said
    assert "x: of at least one model neither scores per item nor a standard error" in said
    assert verdicts.students["s"].recovery["x"].samples is None


def test_a_student_without_spread_takes_nothing_from_the_others():
    teacher = {"p": coins(9, 0.5), "q": coins(9, 0.5)}
    ours = {"p": coins(9, 0.25), "q": coins(9, 0.25)}
    alone = Verdicts(board(teacher, {"ours": ours})).students["ours"]
    both = Verdicts(board(teacher, {"ours": ours, "theirs": {"p": Score(0.4), "q": Score(0.4)}})).students
    assert both["ours"].recovery["p"].samples == alone.recovery["p"].samples is not None
    assert both["ours"].mean_recovery == alone.mean_recovery
    assert both["theirs"].recovery["p"].samples is None


def test_the_json_is_json_and_holds_every_interval(merged):
    found = json.loads(json.dumps(verdict_tables.verdicts_json(merged), allow_nan=False))
    assert set(found) == set(EXPERTS)
    assert found["merged"]["domains"]["math"]["value"] == pytest.approx(0.95)
    assert {c["domain"] for c in found["merged"]["against"]} == {"math", "code", ALL}
    assert len(found["math"]["intervals"]["critical_tolerance"]["samples"]) == 2


def test_samples_whose_mean_is_not_the_score_are_left_out():
    samples = {"a": 1.0, "b": 0.0}
    assert score_of({"score": 0.5, "stderr": 0.1}, samples).samples == samples
    assert score_of({"score": 0.6, "stderr": 0.1}, samples) == Score(0.6, 0.1)
    assert score_of({"failed": "out of memory"}, {}) == Score(None)
    assert score_of({"score": 0.6, "stderr": math.nan}, {}) == Score(0.6)


@pytest.mark.parametrize(
    "line", ['{"id": "a", "score": null}', '{"id": "a"}', '{"id": "x", "score": 1}', "[1]"], ids=str
)
def test_a_file_of_samples_that_is_not_whole_is_not_used(tmp_path, line):
    path = tmp_path / "t.samples.jsonl"
    path.write_text('{"id": "x", "score": 1.0, "more": "text"}\n{"id": 7, "score": 0}\n')
    assert read_samples(path) == {"x": 1.0, "7": 0.0}
    path.write_text(f'{{"id": "x", "score": 1.0}}\n{line}\n')
    assert read_samples(path) == {}
    assert read_samples(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("task", "domain"),
    [
        ("gsm8k_cot", "math"), ("hendrycks_math500", "math"), ("local_addition", "math"), ("mbpp_plus", "code"),
        ("humaneval_instruct", "code"), ("mmlu", "stem"), ("gpqa_main_cot_zeroshot", "stem"), ("ifeval", "chat"),
        ("arc_challenge", "language"), ("local_recall", "retrieval"), ("leaderboard_math_hard", "math"),
        ("something_else", "other"),
    ],
)  # fmt: skip
def test_a_task_s_domain_by_its_name(task, domain):
    assert by_name(task) == domain


def test_a_local_task_belongs_to_the_one_expert_whose_data_it_is_made_from():
    sources = {"a": Source(path="a"), "b": Source(path="b"), "both": Source(path="c")}
    experts = {
        "algebra": Expert({name: sources[name] for name in ("a", "both")}),
        "laws": Expert({name: sources[name] for name in ("b", "both")}),
        "generalist": Expert(sources, union_of=("algebra", "laws")),
    }
    chosen = Eval(domains={"court": ("barexam", "local_words_b")})
    config = Config(Teacher("t", "llama", "folder", "t"), experts=tuple(experts), expert=experts, eval=chosen)
    tasks = ["local_cloze_a", "local_cloze_b", "local_cloze_both", "local_words_b", "barexam", "gsm8k"]
    assert list(domains_of(config, tasks).values()) == ["algebra", "laws", "both", "court", "court", "math"]
