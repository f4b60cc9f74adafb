"""lm-eval's tasks as this project asks them: found by name, with the settings' shots and budgets, judged safely.

The paper's suites are `configs/eval/paper-base.yaml` and `paper-instruct.yaml`. What lm-eval lacks of them stands in
`OURS`, MT-Bench excepted: its judge is another language model.

Loading is offline and reads only the folder that a task lies in: lm-eval's index of all 12,000 takes 12 s.
"""

import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.tasks import PREFIX, runs_code
from xlstm_distill.evaluate import mathematics
from xlstm_distill.evaluate.sandbox import PassAt1, check_sandbox

VERSION = 2
"""Raised whenever a score comes out otherwise for the same answers."""
ABSENT = {"MT-Bench": "needs a language model as its judge"}
"""Of the paper's benchmarks."""
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "humaneval_plus_instruct": ("humaneval_instruct", {"dataset_path": "evalplus/humanevalplus"}),
    "mbpp_plus_instruct_shots": (
        "mbpp_plus_instruct",  # asks without examples: an example's answer there is its test
        {"doc_to_target": "{% if is_fewshot is defined %}{{code}}\n```{% else %}{{test_list | join('\n')}}{% endif %}"},
    ),
}
"""What lm-eval lacks: name → its task that comes nearest, and what is different."""
MATHEMATICAL = ("gsm8k", "hendrycks_math", "leaderboard_math", "minerva_math")
"""How the names of tasks begin whose answers Math-Verify compares."""
OPENED = re.compile(r"```(?:python|py)[ \t]*\n")
"""A code block that an answer opens itself."""
NAMED = re.compile(rb"^(?:task|group):[ \t]*['\"]?([\w.-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Asked:
    """How one task is asked; what is left out is as lm-eval has it."""

    task: str
    shots: int | None = None
    """Examples before each question."""
    max_new_tokens: int = 0
    """That an answer may have; 0: the task's own."""
    chat: bool = False
    """Under the chat template, examples as turns."""
    limit: int = 0
    """Items of each task or subtask; 0: all."""
    seed: int = 0
    """Of examples and of whatever else lm-eval draws."""
    code: bool | str = field(default=False, compare=False)
    """`eval.allow_code_execution`."""

    @classmethod
    def of(cls, config: Config, task: str) -> "Asked":
        """As a run asks it."""
        settings = config.eval
        return cls(
            task,
            shots=settings.shots.get(task),
            max_new_tokens=settings.max_new_tokens.get(task, 0),
            chat=settings.chat,
            limit=settings.limit,
            seed=config.seed,
            code=settings.allow_code_execution,
        )

    @property
    def settings(self) -> list[Any]:
        """What changes the score, as JSON."""
        return [VERSION, self.task, self.shots, self.max_new_tokens, self.chat, self.limit, self.seed]


def check_tasks(tasks: Sequence[str], code: bool | str, key: str = "eval.tasks") -> None:
    """Refuse what cannot be asked here, before anything is loaded.

    Args:
        tasks: full names.
        code: `eval.allow_code_execution`.
        key: the setting that names them.

    Raises:
        Mistake: lm-eval is not installed or knows no such task, or one runs programs and they may not be run here.
    """
    if tasks and not _files():
        raise Mistake(f"{key}: lm_eval is not installed: pip install 'xdl[eval]'")
    for task in tasks:
        if not task.startswith(PREFIX) and find(OURS.get(task, (task, {}))[0]) is None:
            raise Mistake(f"{key}: {task}: neither a local task nor one of lm-eval's")
    if any(map(runs_code, tasks)):
        check_sandbox(code)


def load(asked: Asked, local: Path) -> Any:
    """lm-eval's task or group of tasks.

    Args:
        asked: name and settings.
        local: folder of the local tasks.

    Raises:
        Mistake: lm-eval is not installed or knows no such task, or the task runs code and may not.
    """
    name, changes = OURS.get(asked.task, (asked.task, {}))
    if runs_code(name) and not asked.code:
        raise Mistake(f"eval.tasks: {name}: runs programs that the model writes; see eval.allow_code_execution")
    manager, registry = _manager(name, local)
    random.seed(asked.seed)  # GPQA's choices are shuffled as the task is built
    with _no_code_eval():
        top = manager._factory.build(
            registry[name], overrides=_overrides(asked, name, changes) or None, registry=registry
        )
    if isinstance(top, list):
        raise Mistake(f"eval.tasks: {name}: a tag of lm-eval; name its tasks: {', '.join(t.task_name for t in top)}")
    for task in top.get_all_tasks() if hasattr(top, "get_all_tasks") else [top]:
        if asked.shots is not None:
            task.set_config("num_fewshot", asked.shots)
        if asked.max_new_tokens and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": asked.max_new_tokens}, update=True)
    return top


def _manager(name: str, local: Path) -> tuple[Any, dict[str, Any]]:
    """lm-eval's manager over the folder that holds `name`, and its registry of tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Mistake(f"eval: {error.name} is not installed: pip install 'xdl[eval]'") from error
    if name.startswith(PREFIX):
        manager = TaskManager(include_path=str(local), include_defaults=False)
    elif (file := find(name)) is None:
        raise Mistake(f"eval.tasks: {name}: neither a local task nor one of lm-eval's")
    else:
        manager = TaskManager(include_path=str(file.parent), include_defaults=False)
        if _elsewhere(name, manager.task_index):
            manager = TaskManager()
    if name not in manager.all_tasks:
        raise Mistake(f"eval.tasks: {name}: neither a local task nor one of lm-eval's")
    return manager, manager.task_index


def _elsewhere(name: str, index: Mapping[str, Any]) -> bool:
    """Whether a group has members that lie in other folders."""
    if name not in index:
        return True
    members = (index[name].cfg or {}).get("task")
    names = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members or ()]
    return isinstance(members, list) and any(isinstance(member, str) and _elsewhere(member, index) for member in names)


def find(name: str) -> Path | None:
    """The file of lm-eval that defines the task or group `name`."""
    return _files().get(name)


def names() -> list[str]:
    """Names of all tasks and groups of lm-eval, and ours; none where it is not installed."""
    return [*_files(), *OURS] if _files() else []


@cache
def _files() -> dict[str, Path]:
    """Name → file, by the lines that say so: no YAML is parsed."""
    import importlib.util

    spec = importlib.util.find_spec("lm_eval")
    root = Path(next(iter(spec.submodule_search_locations or ()))) / "tasks" if spec else Path("none")
    found: dict[str, Path] = {}
    for folder, _, names in os.walk(root):
        for file in (Path(folder) / name for name in sorted(names) if name.endswith(".yaml")):
            if match := NAMED.search(file.read_bytes()):
                found.setdefault(match[1].decode(), file)
    return found


def _overrides(asked: Asked, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What the task's file says otherwise: ours, a score by Math-Verify, programs run in the sandbox."""
    found = {"task": asked.task, **changes} if changes else {}
    if runs_code(name):
        metric = PassAt1(asked.code != "unconfined", tested=name.startswith("cruxeval"))
        found["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
    if name.startswith("mbpp") and "instruct" in name:
        extract = {"function": "custom", "filter_fn": _programs}
        found["filter_list"] = [{"name": "extract_code", "filter": [extract]}]
    if name.startswith(MATHEMATICAL) and "self_consistency" not in name:
        found["process_results"] = mathematics.process_results
        found["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
        found["filter_list"] = None
    return found


def _programs(answers: Sequence[Sequence[str]], docs: Any) -> list[list[str]]:
    """The programs in answers to a prompt that ends with an opened code block. lm-eval's own filter takes the first
    word of the program, mostly `def`, for the name of a language."""
    return [[_program(answer) for answer in found] for found in answers]


def _program(answer: str) -> str:
    opened = OPENED.search(answer)
    return answer[opened.end() :].split("```")[0] if opened else answer.split("```")[0]


@contextmanager
def _no_code_eval() -> Iterator[None]:
    """While lm-eval's tasks are imported: those of HumanEval and MBPP load the metric `code_eval` from the hub and run
    a program with it right away. Our metric takes its place, so theirs is never asked."""
    import evaluate

    class Nothing:
        def compute(self, **ignored: Any) -> tuple[dict[str, float], dict[str, Any]]:
            return {"pass@1": 0.0}, {}

    before = evaluate.load
    evaluate.load = lambda path, *args, **options: Nothing() if path == "code_eval" else before(path, *args, **options)
    try:
        yield
    finally:
        evaluate.load = before


def bring(tasks: Sequence[str]) -> None:
    """Load tasks once where there is internet, so that their data sets are in Hugging Face's cache for the others."""
    for task in tasks:
        load(Asked(task, code=True), Path())
        print(f"{task}: here", flush=True)


if __name__ == "__main__":
    import sys

    bring(sys.argv[1:])
