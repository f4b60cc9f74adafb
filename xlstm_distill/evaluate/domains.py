"""Task → domain: what a report sums up by. Domains are named like the experts, so that each finds its own."""

from collections.abc import Iterable, Mapping

from xlstm_distill.contract.schema import Config
from xlstm_distill.contract.tasks import PER_SOURCE, PREFIX

STARTS: Mapping[str, tuple[str, ...]] = {
    "retrieval": ("needle", "niah", "ruler", "recall", "passkey", "longbench"),
    "code": ("humaneval", "mbpp", "cruxeval", "livecodebench", "bigcodebench"),
    "math": (
        "gsm8k", "gsm_plus", "hendrycks_math", "leaderboard_math", "minerva_math", "math", "aime", "asdiv", "svamp",
        "addition",
    ),
    "stem": ("gpqa", "mmlu", "sciq", "scibench"),
    "chat": ("ifeval", "mt_bench", "alpaca_eval", "arena_hard"),
    "language": (
        "piqa", "arc", "hellaswag", "winogrande", "lambada", "boolq", "openbookqa", "copa", "wikitext", "blimp",
    ),
}  # fmt: skip
"""Domain → how the names of its tasks start, lm-eval's and (after their prefix) ours."""
OTHER = "other"


def domains_of(config: Config, tasks: Iterable[str]) -> dict[str, str]:
    """Domain of each task of a run: as `eval.domains` says, else the one expert whose data a local task is made from,
    else by its name."""
    owners: dict[str, list[str]] = {}
    for expert in config.specialists:
        for source in config.expert[expert].sources:
            owners.setdefault(source, []).append(expert)
    made_from = {
        f"{PREFIX}{kind}_{source}": experts[0] if len(experts) == 1 else source
        for source, experts in owners.items()
        for kind in PER_SOURCE
    }
    chosen = {task: domain for domain, named in config.eval.domains.items() for task in named}
    return {task: chosen.get(task) or made_from.get(task) or by_name(task) for task in tasks}


def by_name(task: str) -> str:
    """Domain of a task by the longest start of its name that is known."""
    plain = task.removeprefix(PREFIX).lower()
    fitting = [(len(start), domain) for domain, starts in STARTS.items() for start in starts if plain.startswith(start)]
    return max(fitting)[1] if fitting else OTHER
