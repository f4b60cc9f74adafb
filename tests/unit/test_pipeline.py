"""The whole pipeline with a tiny random teacher, its stages called in one process in the order of the graph."""

import json
from pathlib import Path

import pytest
import yaml
from eval_support import save_model, tiny_llama, tiny_tokenizer

from launcher.compose import compose
from launcher.plan import plan, states
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.manifest import read_manifest, verify_outputs
from xlstm_distill.contract.state import prepare, state_of
from xlstm_distill.stages import run_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("signal_handlers")]
STEP = 4 * 128
TEXTS = {
    "fox": "The quick brown fox number {n} jumps over the lazy dog. The dog sleeps under the tree near {n} stones. ",
    "sea": "A ship with {n} sails crosses the wide sea. The wind blows from the north and {n} waves roll ashore. ",
}
TRAINING = {"batch": 4, "micro_batch": 2, "validate_every": 0, "validation_samples": 8, "checkpoint_every": 10}
JOBS = ["fetch", "tokenize", "cache", "align", "distill-fox", "distill-sea", "merge", "eval", "report"]


def write_configs(root: Path) -> None:
    """A teacher of the user's own and a recipe for it, in a configuration folder of the user's own."""
    save_model(root / "teacher", tiny_llama(), tiny_tokenizer())
    sources = {}
    for name, text in TEXTS.items():
        lines = (json.dumps({"text": text.format(n=n) * 2}) for n in range(120))
        (root / f"{name}.jsonl").write_text("\n".join(lines))
        sources[name] = {"weight": 1.0, "kind": "jsonl", "path": str(root / f"{name}.jsonl")}
    teacher = {"name": "tiny", "family": "llama", "source": "folder", "path": str(root / "teacher"), "recipe": "tiny"}
    recipe = {
        "experts": list(TEXTS),
        "student": {"window": 8, "sinks": 2, "chunk": 16},
        "data": {
            "sequence": 128,
            "validation": 0.15,
            "sources": {name: {**source, "weight": 0.5} for name, source in sources.items()},
        },
        "expert": {name: {"sources": {name: source}, "merge_weight": 0.5} for name, source in sources.items()},
        "cache": {"top_k": 16},
        "align": {**TRAINING, "tokens": 30 * STEP, "lr": 1e-2},
        "distill": {**TRAINING, "tokens": 30 * STEP, "lr": 2e-3, "gamma": 0.1, "beta": 0.9},
        "eval": {"tasks": ["local_addition", "local_perplexity_fox"], "limit": 3, "samples": 4, "batch": 4},
        "strategy": {"precision": "float32", "threads": 1},
    }
    for group, value in (("teacher", teacher), ("recipe", recipe)):
        (root / "configs" / group).mkdir(parents=True)
        header = "# @package _global_\n" if group == "recipe" else ""
        (root / "configs" / group / "tiny.yaml").write_text(header + yaml.safe_dump(value))


def launch(run: Path) -> list[str]:
    """What `xdl launch` does on one machine, without a process per job; the names of the jobs that ran."""
    config = compose(["teacher=tiny", "stage=pipeline", "cluster=local"]).config
    ran = []
    for job in plan(config):
        folder = JobFolder(run / "jobs" / job.name, job, config)
        if not state_of(folder.path, job).done:
            prepare(folder.path, job)
            folder.write()
            run_job(folder.path)
            ran.append(job.name)
    assert all(state.done for state in states(plan(config), run / "jobs").values())
    return ran


def test_from_the_teacher_to_the_report_once_and_again_only_what_is_missing(tmp_path, monkeypatch):
    write_configs(tmp_path)
    monkeypatch.setenv("XDL_CONFIG_DIR", str(tmp_path / "configs"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = tmp_path / "run"
    assert launch(run) == JOBS
    manifests = {name: read_manifest(run / "jobs" / name / "manifest.json") for name in JOBS}
    for name, manifest in manifests.items():
        assert manifest.outputs, name
        assert verify_outputs(manifest, run / "jobs" / name / "output", deep=True) is None

    aligned = manifests["align"].facts
    assert aligned["heads_shut"] == []
    pairs = zip(aligned["error_before"], aligned["error_after"], strict=True)
    assert all(after < 0.95 * before for before, after in pairs)
    for name in TEXTS:
        validation = manifests[f"distill-{name}"].facts["validation"]
        assert validation["end"][name]["kl"] < 0.8 * validation["start"][name]["kl"]

    scores = manifests["eval"].facts
    assert set(scores) == {"teacher", "window", "aligned", "fox", "sea", "merged"}
    report = run / "jobs/report/output"
    assert {"report.md", "report.html"} <= {path.name for path in report.iterdir()}
    assert list(report.glob("*.png"))
    assert "merged" in (report / "report.md").read_text()

    assert launch(run) == []
    before = {name: (run / "jobs" / name / "manifest.json").stat().st_mtime_ns for name in JOBS}
    (run / "jobs/distill-fox/manifest.json").unlink()
    again = launch(run)
    assert again[0] == "distill-fox"
    assert not {"fetch", "tokenize", "cache", "align", "distill-sea"} & set(again)
    for name in ("fetch", "tokenize", "cache", "align", "distill-sea"):
        assert (run / "jobs" / name / "manifest.json").stat().st_mtime_ns == before[name]
    # Made from the same checkpoint it is the same expert, so what was made from it stands.
    assert read_manifest(run / "jobs/distill-fox/manifest.json").digest == manifests["distill-fox"].digest
