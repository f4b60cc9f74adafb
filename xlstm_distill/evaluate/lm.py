"""lm-eval in this process, offline: one task on one model, requests shared among the ranks."""

import json
import os
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import World
from xlstm_distill.evaluate import suites
from xlstm_distill.evaluate.results import Result, short
from xlstm_distill.evaluate.suites import Asked
from xlstm_distill.evaluate.team import Team

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
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
"""Of lm-eval's requests."""
LOGITS = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Logits that a forward for log-likelihoods may make: lm-eval computes all of them, several times over."""


class _NeverStop:
    def requested(self, also: bool = False) -> bool:
        return also

    def expect(self, seconds: float) -> None:
        pass


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Asked,
    local: Path,
    batch: int,
) -> Result:
    """One task on a model in memory, in this process alone.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        asked: name and settings.
        local: folder of the local tasks.
        batch: requests per forward.

    Raises:
        Mistake: lm-eval is not installed, or knows no such task.
    """
    team = Team(World(), _NeverStop())
    return run_task(shared_lm(team, model, tokenizer, batch), asked, local)


def run_task(lm: Any, asked: Asked, local: Path) -> Result:
    """One task on a model.

    Args:
        lm: of `shared_lm`.
        asked: name and settings.
        local: folder of the local tasks.

    Raises:
        Mistake: there is no such task, or it may not run here.
        Exception: whatever lm-eval, the task or a rank fell over.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    top = suites.load(asked, local)
    chat = asked.chat and not asked.task.startswith(suites.PREFIX)
    found = simple_evaluate(
        model=lm,
        tasks=[top],
        limit=asked.limit or None,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=1000,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        random_seed=asked.seed,
        numpy_random_seed=asked.seed,
        torch_random_seed=asked.seed,
        fewshot_random_seed=asked.seed,
        confirm_run_unsafe_code=suites.runs_code(asked.task) and bool(asked.code),
    )
    samples = found.pop("samples")
    # What is no JSON (functions, dtypes) is written as its name.
    results = dict(json.loads(json.dumps(found, default=str)))
    score = scores_of(results)[asked.task]
    return Result(results, score, _samples(samples, score["metric"], asked.task))


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, task: str) -> list[dict[str, Any]]:
    """One line per item, of all subtasks of a group."""
    name, filtered = metric.split(",", 1)
    lines = []
    for part, found in samples.items():
        for sample in (sample for sample in found if sample["filter"] == filtered):
            identity = str(sample["doc_id"]) if part == task else f"{part}/{sample['doc_id']}"
            lines.append(short(sample, identity, _number(sample.get(name))))
    return lines


def _number(value: Any) -> float | None:
    """The score of one item: nats per byte (or word) where lm-eval has a log-likelihood and a length."""
    if isinstance(value, tuple) and len(value) == 2:
        return -float(value[0]) / max(1, value[1])
    return float(value) if isinstance(value, bool | int | float) else None


def scores_of(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{task: {"score", "stderr", "metric", "higher_is_better", "items"}}` from lm-eval's results.

    Of a metric under several filters the `flexible-extract` counts: `strict-match` wants words that a prompt without
    examples does not ask for.

    Args:
        results: lm-eval's.
    """
    scores = {}
    for task, values in results["results"].items():
        metrics = [key for key in values if "," in key and "_stderr" not in key]
        if not metrics:
            continue
        metric = min(metrics, key=lambda key: (_rank(key.split(",")[0]), "flexible" not in key))
        name, filtered = metric.split(",", 1)
        stderr = values.get(f"{name}_stderr,{filtered}")
        scores[task] = {
            "score": values[metric],
            "stderr": stderr if isinstance(stderr, int | float) else None,
            "metric": metric,
            "higher_is_better": bool(results.get("higher_is_better", {}).get(task, {}).get(name, True)),
            "items": results.get("n-samples", {}).get(task, {}).get("effective", values.get("sample_len")),
        }
    return scores


def _rank(metric: str) -> int:
    return PREFERRED.index(metric) if metric in PREFERRED else len(PREFERRED)


def shared_lm(team: Team, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: int) -> Any:
    """lm-eval's model class over this rank's copy; on rank 0 it shares its requests among all ranks.

    Every rank makes one, from copies of the same model.

    Args:
        team: the ranks; their handlers of lm-eval's requests become those of this copy.
        model: this rank's copy.
        tokenizer: of the model.
        batch: requests per forward of a rank.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    lm = _shared_class()(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device))
    lm.team, lm.most = team, batch
    team.handlers |= {kind: types.MethodType(_answer(kind), lm) for kind in KINDS}
    return lm


def _answer(kind: str) -> Any:
    """The handler of one kind of requests: groups of them, each with its length → the answers to each group."""

    def answer(lm: Any, groups: list[tuple[int, list[Any]]]) -> list[list[Any]]:
        requests = [types.SimpleNamespace(args=arguments) for _, group in groups for arguments in group]
        lm.batch_size_per_gpu = lm.rows(kind, max(length for length, _ in groups))
        found = iter(getattr(super(_shared_class(), lm), kind)(requests, disable_tqdm=True))
        return [[next(found) for _ in group] for _, group in groups]

    return answer


@cache
def _shared_class() -> Any:
    """The class of `shared_lm`; lm-eval takes seconds to import."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise Mistake(f"eval: {error.name} is not installed: pip install 'xdl[eval]'") from error

    class SharedLM(HFLM):
        team: Team
        most: int

        def rows(self, kind: str, length: int) -> int:
            """Requests of so many tokens in one forward."""
            if kind == "generate_until":
                return self.most
            return max(1, min(self.most, LOGITS[self.device.type] // (length * self.model.config.vocab_size)))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self.shared("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self.shared("loglikelihood_rolling", requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self.shared("generate_until", requests)

        def shared(self, kind: str, requests: Sequence[Any]) -> list[Any]:
            """The answers, in the order of the requests. Choices to one question stay together, because lm-eval reads
            several of one token off one forward; the longest go first."""
            groups: dict[Any, list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(request.args[0] if kind == "loglikelihood" else index, []).append(index)
            sized = [
                (max(self.length(kind, requests[i].args) for i in group), [requests[i].args for i in group], group)
                for group in groups.values()
            ]
            sized.sort(key=lambda item: -item[0])
            items = [(length, arguments) for length, arguments, _ in sized]
            answers = self.team.share(kind, items, lambda first: self.rows(kind, items[first][0]))
            found: list[Any] = [None] * len(requests)
            for (_, _, group), answer in zip(sized, answers, strict=True):
                for index, value in zip(group, answer, strict=True):
                    found[index] = value
            return found

        def length(self, kind: str, arguments: Sequence[Any]) -> int:
            """Tokens of a request, at most the model's positions."""
            text = "".join(arguments) if kind == "loglikelihood" else arguments[0]
            return max(1, min(len(self.tok_encode(text)), self.max_length))

    return SharedLM
