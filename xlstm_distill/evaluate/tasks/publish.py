"""Local tasks as lm-eval reads them: `NAME.jsonl` with the items, `NAME.yaml` beside it, written once per run.

local_recall               key-value recall from beyond the window, 4 choices
local_addition             sums below 30 after four examples, free generation, exact match
local_cloze_SOURCE         a held-out word that last stood beyond the window, 4 choices
local_answers_SOURCE       the answer behind a worked solution of text like the demo's, written
local_words_SOURCE         a held-out sentence or the same with two words swapped
local_perplexity_SOURCE    perplexity per byte of short held-out texts (lower is better)
local_needle_…_LENGTH      one needle (single) or one of several (multi) in a haystack of so many tokens; the value is
                           written, or chosen of four (…_choice)

`local_positions_SOURCE` is not among them: lm-eval has no such task (`evaluate/position.py`).
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import beside, hash_value, sync, write_json
from xlstm_distill.contract.tasks import PER_LENGTH, PREFIX, local_names
from xlstm_distill.evaluate.tasks import items as make
from xlstm_distill.evaluate.tasks.needle import needle
from xlstm_distill.evaluate.tasks.text import Fragment, decode, read_fragments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Raised whenever items come out otherwise for the same text and seed."""
COUNTS = {"recall": 24, "addition": 24, "cloze": 20, "words": 16, "answers": 16, "perplexity": 4, "needle": 100}
"""Items per task: but for the needles about 8,000 tokens in a run with two sources; `eval.limit` takes the first."""
PASSAGE = 96
"""Tokens of a text whose perplexity is measured."""
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
GENERATION: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    "filter_list": [
        {
            "name": "line",
            "filter": [
                {"function": "regex", "regex_pattern": r"^\s*(.*?)\.?\s*$"},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
NEEDLE: dict[str, Any] = {
    **GENERATION,
    "filter_list": [
        {
            "name": "word",
            "filter": [{"function": "regex", "regex_pattern": r"^\s*(\w+)"}, {"function": "take_first"}],
        }
    ],
}
"""The first word that is written."""
PERPLEXITY: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [
        {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}
FORMS = {
    "recall": CHOICE,
    "addition": GENERATION,
    "cloze": CHOICE,
    "words": CHOICE,
    "answers": GENERATION,
    "perplexity": PERPLEXITY,
    "needle_single": NEEDLE,
    "needle_multi": NEEDLE,
    "needle_single_choice": CHOICE,
    "needle_multi_choice": CHOICE,
}


def check_names(tasks: Iterable[str], sources: Iterable[str], lengths: Iterable[int] = ()) -> None:
    """Refuse a `local_…` task that does not exist.

    Raises:
        Mistake: with the names that do.
    """
    known = local_names(sources, lengths)
    for task in tasks:
        if task.startswith(PREFIX) and task not in known:
            raise Mistake(f"eval.tasks: {task}: no such local task; there are {', '.join(known)}")


def kind_of(task: str) -> tuple[str, str]:
    """Kind of a local task, and the source or the length that it names."""
    name = task.removeprefix(PREFIX)
    for kind in sorted(PER_LENGTH, key=len, reverse=True):
        if name.startswith(f"{kind}_"):
            return kind, name.removeprefix(f"{kind}_")
    kind, _, source = name.partition("_")
    return kind, source


def publish(
    folder: Path,
    tasks: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    shards: Mapping[str, Path],
    *,
    window: int,
    sequence: int,
    seed: int,
    key: Any,
    lengths: Iterable[int] = (),
) -> Path:
    """Write the local ones among `tasks` to `folder`, unless they stand there already.

    Several processes may do so at once: each writes beside, one of them renames first, all files are the same.

    Args:
        folder: to make.
        tasks: names from the configuration; those that are not local are passed over.
        tokenizer: of the teacher.
        shards: source → its folder of token shards.
        window: positions that the student's window covers.
        sequence: longest prompt.
        seed: of the items.
        key: what the shards and the tokenizer are made from (JSON); another one makes the tasks anew.
        lengths: of needle tasks.

    Returns:
        `folder`.
    """
    names = [task for task in tasks if task.startswith(PREFIX)]
    check_names(names, shards, lengths)
    mark = hash_value([VERSION, COUNTS, names, window, sequence, seed, key, str(folder)])
    if _mark(folder) == mark:
        return folder
    items = _Maker(tokenizer, shards, window, sequence, seed)
    written = beside(folder)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    for name in names:
        _write_task(written, folder, name, items.make(name))
    write_json(written / "tasks.json", {"mark": mark, "tasks": names})
    if folder.exists() and _mark(folder) != mark:
        stale = written.with_name(f"{written.name}.stale")
        with suppress(OSError):  # another process took it away
            folder.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)
    try:
        written.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(written)
    sync(folder.parent)
    return folder


def _mark(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "tasks.json").read_text(encoding="utf-8"))["mark"])
    except (OSError, ValueError, KeyError):
        return None


def _write_task(folder: Path, final: Path, name: str, items: list[make.Item]) -> None:
    if not items:
        raise Mistake(f"eval.tasks: {name}: the held-out text has nothing to make it from; leave the task out")
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((final / f"{name}.jsonl").absolute())}},
        "test_split": "test",
        **FORMS[kind_of(name)[0]],
        "metadata": {"version": VERSION},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


class _Maker:
    """Makes the items of a task by its name; reads each source once."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        shards: Mapping[str, Path],
        window: int,
        sequence: int,
        seed: int,
    ) -> None:
        self.tokenizer, self.shards, self.window, self.sequence, self.seed = tokenizer, shards, window, sequence, seed
        self._fragments: dict[str, list[Fragment]] = {}

    def fragments(self, source: str) -> list[Fragment]:
        if source not in self._fragments:
            self._fragments[source] = read_fragments(self.shards[source])
        return self._fragments[source]

    def texts(self, source: str) -> list[str]:
        return [decode(self.tokenizer, fragment.tokens) for fragment in self.fragments(source)]

    def make(self, name: str) -> list[make.Item]:
        kind, source = kind_of(name)
        seed, tokenizer = self.seed, self.tokenizer
        count = COUNTS[kind if kind in COUNTS else kind.partition("_")[0]]
        if kind in PER_LENGTH:
            many, choices = "multi" in kind, kind.endswith("choice")
            return needle(tokenizer, many, choices, int(source), count, seed)
        makers: dict[str, Callable[[], list[make.Item]]] = {
            "recall": lambda: make.recall(tokenizer, self.window, self.sequence, count, seed),
            "addition": lambda: make.addition(count, seed),
            "cloze": lambda: make.cloze(tokenizer, self.fragments(source), self.window, count, seed),
            "words": lambda: make.swapped_words(self.texts(source), count, seed),
            "answers": lambda: make.answers(self.texts(source), count),
            "perplexity": lambda: make.passages(tokenizer, self.fragments(source), PASSAGE, count),
        }
        return makers[kind]()
