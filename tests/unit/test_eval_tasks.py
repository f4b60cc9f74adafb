"""The local tasks: deterministic, answerable, and asking for what has left the window."""

import itertools
import json

import pytest
import yaml
from eval_support import tiny_tokenizer

from launcher.compose import compose
from launcher.plan import plan
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.tasks import expand, lengths_of, local_names
from xlstm_distill.evaluate.tasks import items
from xlstm_distill.evaluate.tasks.needle import needle
from xlstm_distill.evaluate.tasks.publish import check_names, kind_of, publish
from xlstm_distill.evaluate.tasks.text import Fragment, split


class WordTokenizer:
    """A token is a space and a word, as the byte-pair encodings of large models have them."""

    def __init__(self):
        self.words = {}

    def encode(self, text, add_special_tokens=True):
        parts = text.replace("\n", " \n ").replace(".", " .").split(" ")
        return [self.words.setdefault(" " + part, len(self.words)) for part in parts if part]

    def decode(self, tokens, **options):
        names = list(self.words)
        return "".join(names[token] for token in tokens)


@pytest.fixture
def tokenizer():
    return WordTokenizer()


@pytest.mark.parametrize("window", [16, 64, 256])
def test_recall_asks_for_a_pair_that_has_left_the_window(tokenizer, window):
    for item in items.recall(tokenizer, window, 2048, 20, seed=0):
        right = item["choices"][item["answer"]]
        key = item["prompt"].rsplit("The code of ", 1)[1].removesuffix(" is")
        before, after = item["prompt"].split(f"The code of {key} is{right}.\n")
        assert len(tokenizer.encode(after)) >= window
        assert before  # not the first pair, which the sinks would see
        assert len(set(item["choices"])) == 4
        assert all(f" is{choice}." in item["prompt"] for choice in item["choices"])


def test_recall_stays_within_the_longest_prompt(tokenizer):
    longest = max(len(tokenizer.encode(item["prompt"])) for item in items.recall(tokenizer, 4096, 512, 5, seed=0))
    assert longest <= 512


def cloze_text(tokenizer):
    words = [f"w{i}" if i % 2 else "name" + "abcdefghijklmnopqrstuvwxyz"[i // 2 % 26] * 3 for i in range(400)]
    tokens = tokenizer.encode(" ".join(words))
    return [Fragment(tuple(tokens), (True,) * len(tokens))]


def test_cloze_asks_for_a_word_that_last_stood_beyond_the_window(tokenizer):
    found = items.cloze(tokenizer, cloze_text(tokenizer), 16, 10, seed=0)
    assert len(found) == 10
    for item in found:
        words = item["prompt"].split(" ")
        for choice in item["choices"]:
            assert choice.strip() in words
            assert choice.strip() not in words[-16:]


def test_cloze_makes_fewer_items_where_the_text_has_no_more(tokenizer):
    tokens = tuple(tokenizer.encode("too short for the window"))
    assert items.cloze(tokenizer, [Fragment(tokens, (True,) * 5)], 16, 10, seed=0) == []


def test_swapped_words_differ_from_the_original_in_one_neighbouring_pair():
    text = "Return the first of all items that are larger than the given key. no. Short one."
    (item,) = items.swapped_words([text], 5, seed=0)
    right, wrong = item["choices"][item["answer"]], item["choices"][1 - item["answer"]]
    assert right in text
    changed = [i for i, (a, b) in enumerate(zip(right.split(), wrong.split(), strict=True)) if a != b]
    assert len(changed) == 2
    assert changed[1] == changed[0] + 1


def test_answers_ask_for_what_follows_the_worked_solution():
    text = "Question: What is 2 + 3?\nAnswer: 2 + 3 = 5\nThe answer is 5.\n"
    found = items.answers([text, "x" + text, "Question: and?\n"], 5)
    assert found == [{"prompt": "Question: What is 2 + 3?\nAnswer: 2 + 3 = 5\nThe answer is", "answer": "5"}]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("length", [128, 200, 1000])
def test_a_needle_stands_once_in_a_haystack_of_the_length(tokenizer, many, length):
    found = needle(tokenizer, many, False, length, 12, seed=0)
    for item in found:
        haystack, question = item["prompt"].split("\nWhat is the code of ")
        key = question.split("?")[0]
        assert haystack.count(f"The code of {key} is {item['answer']}.") == haystack.count(key) == 1
        assert question == f"{key}?\nThe code of {key} is"
        assert haystack.count("The code of ") == (4 if many else 1)
        assert length - 12 <= len(tokenizer.encode(item["prompt"])) <= length
        place = haystack.index(f"The code of {key}") / len(haystack)
        assert place == pytest.approx(item["depth"], abs=40 / length)


def test_the_first_needles_spread_over_all_depths(tokenizer):
    depths = sorted(item["depth"] for item in needle(tokenizer, False, False, 400, 8, seed=0))
    gaps = [b - a for a, b in itertools.pairwise([0, *depths, 1])]
    assert max(gaps) < 0.25


def test_the_choices_of_many_needles_all_stand_in_the_text(tokenizer):
    for item in needle(tokenizer, True, True, 300, 10, seed=0):
        assert len(set(item["choices"])) == 4
        assert all(f" is{choice}." in item["prompt"] for choice in item["choices"])
        key = item["prompt"].rsplit("The code of ", 1)[1].removesuffix(" is")
        assert f"The code of {key} is{item['choices'][item['answer']]}." in item["prompt"]


def test_needles_are_the_same_for_a_seed_and_others_for_another(tokenizer):
    one, same, other = (needle(tokenizer, True, True, 256, 5, seed) for seed in (1, 1, 2))
    assert one == same != other


def test_a_length_without_room_for_a_needle_is_refused(tokenizer):
    with pytest.raises(Mistake, match=r"eval.lengths: 20: too short for a needle"):
        needle(tokenizer, False, False, 20, 1, seed=0)


def test_names_without_a_source_or_a_length_stand_for_all():
    tasks = ["arc_easy", "local_cloze", "local_needle_multi", "local_words_a", "local_cloze_a"]
    names = expand(tasks, ("a", "b"), (128, 256))
    assert names == (
        "arc_easy", "local_cloze_a", "local_cloze_b", "local_needle_multi_128", "local_needle_multi_256",
        "local_words_a",
    )  # fmt: skip
    assert set(names[1:]) < set(local_names(["a", "b"], [128, 256]))
    assert [kind_of(f"local_{name}") for name in ("needle_multi_256", "needle_multi_choice_256", "cloze_a_b")] == [
        ("needle_multi", "256"),
        ("needle_multi_choice", "256"),
        ("cloze", "a_b"),
    ]


def test_lengths_double_from_half_a_window_to_a_sample():
    def lengths(*overrides):
        return lengths_of(compose([*overrides]).config)

    assert lengths("student.window=512", "data.sequence=4096") == (256, 512, 1024, 2048, 4096)
    assert lengths("student.window=64", "data.sequence=512") == (128, 256, 512)
    assert lengths("eval.lengths=[200,300]") == (200, 300)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eval.lengths=[64]", r"eval.lengths=64: expected 128 to 8192, the teacher's positions"),
        ("eval.lengths=[9000]", r"eval.lengths=9000: expected 128 to 8192"),
        ("eval.shots.gsm8k=-1", r"eval.shots.gsm8k=-1: expected 0 or more"),
        ("eval.max_new_tokens.gsm8k=0", r"eval.max_new_tokens.gsm8k=0: expected 1 or more"),
        ("eval.tasks=[local_needle_both]", r"local_needle_both: no such local task; the nearest is local_needle_"),
        ("eval.allow_code_execution=yes", r"not one of False, True, unconfined"),
    ],
)
def test_settings_that_cannot_be_are_refused(override, said):
    with pytest.raises(Mistake, match=said):
        compose([override])


def test_a_chat_with_a_teacher_that_has_no_template_is_refused():
    with pytest.raises(Mistake, match=r"eval.chat=true: the teacher llama-3.1-8b has no chat template"):
        compose(["teacher=llama-3.1-8b", "eval.chat=true"])


def test_what_is_asked_is_part_of_what_an_evaluation_is():
    def identity(*overrides):
        return plan(compose(["stage=eval", *overrides]).config)["eval"].identity

    base, few = identity(), "eval.shots.arc_easy=3"
    assert identity("eval.batch=2", "eval.lengths=[256]", "eval.allow_code_execution=true", few) == base
    assert identity("eval.tasks=[arc_easy]", few) == {**base, "eval.tasks": ["arc_easy"], "eval.shots.arc_easy": 3}
    needles = identity("eval=needle", "eval.lengths=[256]")
    assert needles["eval.lengths"] == [256]
    assert identity("eval=needle", "eval.lengths=[512]") != needles


def test_addition_gives_the_sum():
    for item in items.addition(20, seed=0):
        a, b = item["prompt"].splitlines()[-1].removesuffix(" =").split(" + ")
        assert int(a) + int(b) == int(item["answer"]) < 30


def test_the_same_seed_gives_the_same_items_and_another_seed_others(tokenizer):
    assert items.recall(tokenizer, 16, 512, 5, seed=1) == items.recall(tokenizer, 16, 512, 5, seed=1)
    assert items.recall(tokenizer, 16, 512, 5, seed=1) != items.recall(tokenizer, 16, 512, 5, seed=2)


def test_a_sample_is_cut_where_its_document_changes():
    found = split([5, 6, 7, 8], [True] * 4, [0, 0, 1, 2])
    assert [f.tokens for f in found] == [(5, 6), (7,), (8,)]


def publish_to(folder, key=0, names=("local_addition", "arc_easy")):
    return publish(folder, names, tiny_tokenizer(), {}, window=16, sequence=512, seed=0, key=key)


def test_tasks_are_written_as_lm_eval_reads_them(tmp_path):
    folder = publish_to(tmp_path / "tasks")
    assert sorted(path.name for path in folder.iterdir()) == [
        "local_addition.jsonl",
        "local_addition.yaml",
        "tasks.json",
    ]
    task = yaml.safe_load((folder / "local_addition.yaml").read_text())
    assert task["task"] == "local_addition"
    with open(task["dataset_kwargs"]["data_files"]["test"]) as file:
        assert set(json.loads(next(file))) == {"prompt", "answer"}


def test_tasks_are_made_again_only_when_their_data_changed(tmp_path):
    first = publish_to(tmp_path / "tasks").stat().st_ino
    assert publish_to(tmp_path / "tasks").stat().st_ino == first
    assert publish_to(tmp_path / "tasks", key=1).stat().st_ino != first
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


def test_an_unknown_local_task_is_refused_with_those_that_exist():
    with pytest.raises(
        Mistake, match=r"local_cloze_pose: no such local task; there are local_recall, .*local_cloze_prose"
    ):
        check_names(["local_cloze_pose"], ["prose"])
    check_names([*local_names(["prose"]), "arc_easy"], ["prose"])


def test_a_task_that_the_text_has_nothing_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("xlstm_distill.evaluate.tasks.publish.read_fragments", lambda source: [])
    with pytest.raises(Mistake, match="local_answers_prose: the held-out text has nothing to make it from"):
        publish(
            tmp_path / "tasks",
            ["local_answers_prose"],
            tiny_tokenizer(),
            {"prose": tmp_path},
            window=16,
            sequence=512,
            seed=0,
            key=0,
        )
