"""What a finished demo run shows, as figures: seconds per job, alignment per layer, shut heads, held-out KL, scores.

    make demo && python benchmarks/demo.py [RUN_DIR] [--json]

Reads manifests only. Seconds are those of the last, unbroken start of each job, from its first metric to its manifest,
so without the start of the process.
"""

import json
import sys
from pathlib import Path
from typing import Any

from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.runtime.metrics import read_metrics


def facts_of(run: Path, job: str) -> dict[str, Any]:
    """Facts in a job's manifest; ends the script, without an error, where there is no finished run to measure."""
    manifest = read_manifest(run / "jobs" / job / "manifest.json")
    if manifest is None:
        print(f"{run}: {job} is not finished, nothing to measure; run make demo first")
        sys.exit(0)
    return dict(manifest.facts)


def alignment(run: Path) -> dict[str, Any]:
    """Relative error of each layer after ÷ before, and the heads that lost a branch."""
    facts = facts_of(run, "align")
    ratios = [after / before for before, after in zip(facts["error_before"], facts["error_after"], strict=True)]
    gates = [gate for layer in facts["output_gate"] for gate in layer]
    return {
        "error_before_mean": sum(facts["error_before"]) / len(ratios),
        "error_after_mean": sum(facts["error_after"]) / len(ratios),
        "ratio_worst_layer": max(ratios),
        "ratio_mean": sum(ratios) / len(ratios),
        "smallest_gate": min(gates),
        "heads_shut": len(facts["heads_shut"]),
        "tokens_per_s": facts["tokens_per_s"],
    }


def seconds(run: Path) -> dict[str, float]:
    """Seconds per job."""
    found = {}
    for folder in sorted((run / "jobs").iterdir()):
        records = read_metrics(folder)
        if records and (folder / "manifest.json").exists():
            found[folder.name] = round((folder / "manifest.json").stat().st_mtime - records[0]["time"], 1)
    return found


def main(arguments: list[str]) -> None:
    """Print the figures."""
    paths = [a for a in arguments if not a.startswith("-")]
    run = Path(paths[0] if paths else "runs/demo")
    evaluation = facts_of(run, "eval")
    figures = {
        "seconds": seconds(run),
        "alignment": alignment(run),
        "heldout": {model: facts["heldout"] for model, facts in evaluation.items()},
        "scores": {
            model: {task: round(entry["score"], 4) for task, entry in facts["scores"].items()}
            for model, facts in evaluation.items()
        },
    }
    print(json.dumps(figures, indent=None if "--json" in arguments else 2))


if __name__ == "__main__":
    main(sys.argv[1:])
