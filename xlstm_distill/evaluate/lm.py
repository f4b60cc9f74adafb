"""lm-eval in this process, offline: local tasks from a folder, its own ones only when one is asked for."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.evaluate.tasks.publish import PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFERRED = (
    "acc_norm",
    "exact_match",
    "pass@1",
    "prompt_level_strict_acc",
    "acc",
    "f1",
    "byte_perplexity",
    "word_perplexity",
)
"""Which of a task's metrics is its score, the first that it has; else its first."""


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    local: Path,
    *,
    batch: int,
    limit: int,
    seed: int,
) -> dict[str, Any]:
    """lm-eval's results of a model in memory.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        tasks: names, local ones and lm-eval's own.
        local: folder of the local tasks.
        batch: requests per forward.
        limit: items per task; 0: all.
        seed: of few-shot examples and of whatever else lm-eval draws.

    Raises:
        Mistake: lm-eval is not installed, or knows no such task.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Mistake(f"eval: {error.name} is not installed: pip install 'xdl[eval]'") from error
    manager = TaskManager(include_path=str(local), include_defaults=any(not t.startswith(PREFIX) for t in tasks))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise Mistake(f"eval.tasks: {unknown[0]}: neither a local task nor one of lm-eval's")
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device)),
        tasks=list(tasks),
        limit=limit or None,
        task_manager=manager,
        bootstrap_iters=1000,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    # What is no JSON (functions, dtypes) is written as its name.
    return dict(json.loads(json.dumps(results, default=str)))


def scores_of(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{task: {"score", "stderr", "metric", "higher_is_better", "items"}}` from lm-eval's results.

    Args:
        results: what `evaluate` returns.
    """
    scores = {}
    for task, values in results["results"].items():
        metrics = [key for key in values if "," in key and "_stderr" not in key]
        if not metrics:
            continue
        metric = min(metrics, key=lambda key: _rank(key.split(",")[0]))
        name, filtered = metric.split(",", 1)
        stderr = values.get(f"{name}_stderr,{filtered}")
        scores[task] = {
            "score": values[metric],
            "stderr": stderr if isinstance(stderr, int | float) else None,
            "metric": metric,
            "higher_is_better": bool(results.get("higher_is_better", {}).get(task, {}).get(name, True)),
            "items": results.get("n-samples", {}).get(task, {}).get("effective"),
        }
    return scores


def _rank(metric: str) -> int:
    return PREFERRED.index(metric) if metric in PREFERRED else len(PREFERRED)
