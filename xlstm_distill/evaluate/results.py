"""What was measured on one model, a task at a time: files that another start finds finished.

output/MODEL/TASK.json             lm-eval's results of the task, and under `xdl` its `key`, its `score` and who `made`
                                   the model (digest of a manifest); of one that failed only
                                   `{"xdl": {"made": …, "failed": "the last line of the error"}}`
output/MODEL/TASK.samples.jsonl    a line for each item: `id`, `score` by the task's main metric, and of lm-eval's
                                   sample what is short: answers, target and hashes
RUNS/.teacher-scores/TASK-KEY.*    the same of teachers, for all runs in the folder

A result stands for its key: the hash of the model, of everything that was asked, and of lm-eval's version.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_distill.contract.files import read_lines, write_atomic, write_json

LONG = 300
"""Characters of a value of an item that is not kept with its score."""
HELD_OUT = ("perplexity", "kl", "kl_within_window", "kl_beyond_window", "agreement", "tokens")
SHARED = ".teacher-scores"
"""Folder beside the runs."""


@dataclass(frozen=True)
class Result:
    """One task on one model."""

    results: dict[str, Any]
    """lm-eval's, without samples."""
    score: dict[str, Any]
    """`score`, `stderr`, `metric`, `higher_is_better`, `items`."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Each with `id` and `score`."""


def paths(folder: Path, name: str) -> tuple[Path, Path]:
    """The files of a result."""
    return folder / f"{name}.json", folder / f"{name}.samples.jsonl"


def write_result(folder: Path, name: str, key: str, made: str, result: Result) -> None:
    """Keep `result`; the file that has its key is written last."""
    main, samples = paths(folder, name)
    write_atomic(samples, "".join(json.dumps(_plain(sample), ensure_ascii=False) + "\n" for sample in result.samples))
    write_json(main, {**_plain(result.results), "xdl": {"key": key, "made": made, "score": result.score}})


def write_failure(folder: Path, name: str, made: str, line: str) -> None:
    """Record that the task failed; a later start tries again."""
    write_json(paths(folder, name)[0], {"xdl": {"made": made, "failed": line}})


def read_result(folder: Path, name: str, key: str) -> Result | None:
    """The result that stands for `key`, or None."""
    main, samples = paths(folder, name)
    found = _read(main)
    about = found.pop("xdl", {})
    if about.get("key") != key or not samples.is_file():
        return None
    return Result(found, about["score"], read_lines(samples))


def read_scores(folder: Path, made: str) -> dict[str, dict[str, Any]]:
    """Task → its score as in `Result.score`, or `{"failed": line}`: all that stand in the folder of a model, of the one
    that `made` is the digest of."""
    found = {path.stem: _read(path).get("xdl", {}) for path in sorted(folder.glob("*.json"))}
    return {
        task: dict(about["score"]) if "score" in about else {"failed": about["failed"]}
        for task, about in found.items()
        if about and about.get("made") == made
    }


def held_out_facts(numbers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of `heldout.summary` by source, what a manifest keeps."""
    return {source: {key: values[key] for key in HELD_OUT if key in values} for source, values in numbers.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def short(sample: Mapping[str, Any], identity: str, score: float | None) -> dict[str, Any]:
    """A line of the samples' file from lm-eval's record of an item: prompts and other long texts are left out."""
    dropped = ("arguments", "doc", "resps", "filter", "metrics", "doc_id")
    item = {key: value for key, value in dict(sample.get("doc") or {}).items() if len(str(value)) <= LONG}
    kept = {key: value for key, value in sample.items() if key not in dropped}
    return {"id": identity, "score": score, "item": item, **kept}


def _plain(value: Any) -> Any:
    """What is no JSON (functions, types) as its name."""
    return json.loads(json.dumps(value, default=str))
