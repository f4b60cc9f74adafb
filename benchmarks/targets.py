"""Which targets to train on: the same short Stage II with each, from one aligned student, at equal tokens.

    python benchmarks/targets.py [--folder FOLDER] [--tokens N] [--ways online k32 …] [--seed N] [--json]

SmolLM2-135M-Instruct on Python's library, T = 256, W = 16 + 4 sinks, the demo's weights (0.1 CE + 0.9 KL). The student
is aligned once; every way then trains it on the same samples in the same order: with the whole distribution of the
teacher beside it (`online`), with the cached top 32 and the mass of the tail (`k32`), with the top 256 renormalised as
in the paper (`k256`), or with other ways to keep or draw 32 tokens. Printed by way: KL(teacher ‖ student) over the
whole vocabulary on held-out text in nats per token, the median seconds of a step and what of them is the teacher and
the wait for data, bytes per token of the targets, and tokens per second of their capture. Jobs run in this process, as
they stand in a run folder; with --folder finished ones are kept and found again.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from launcher.compose import compose
from launcher.plan import plan
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.state import prepare, state_of
from xlstm_distill.data.stream import read_samples
from xlstm_distill.evaluate.heldout import Reference, Sample, final_hidden, measure
from xlstm_distill.runtime.metrics import read_metrics
from xlstm_distill.stages import run_job

SOURCE, SEQUENCE, SAMPLES, HELD_OUT = "demo_code", 256, 32, 16
COMMON = [
    "~data.sources.demo_math", f"data.sources.{SOURCE}.weight=1.0", "experts=[code]", f"data.sequence={SEQUENCE}",
    f"data.sources.{SOURCE}.limit=60", f"expert.code.sources.{SOURCE}.limit=60", "eval.tasks=[]",
    "align.tokens=8192", "align.checkpoint_every=1000", "distill.checkpoint_every=1000", "distill.validation_samples=1",
    "align.validation_samples=2", f"cache.max_samples={SAMPLES}", "cluster=local", "strategy.precision=float32",
]  # fmt: skip
WAYS = {
    "online": ["distill.targets=online", "distill.loss=full"],
    "k32": ["cache.top_k=32", "distill.loss=topk_tail"],
    "k256": ["cache.top_k=256", "distill.loss=topk"],
    "k256-tail": ["cache.top_k=256", "distill.loss=topk_tail"],
    "k32-renormalised": ["cache.top_k=32", "distill.loss=topk"],
    "k32-hybrid": ["cache.top_k=32", "cache.sampler=hybrid", "distill.loss=random"],
    "k32-random": ["cache.top_k=32", "cache.sampler=random", "distill.loss=random"],
}
SHARED = {"k32-renormalised": "k32", "k256-tail": "k256"}
"""Ways that read the targets of another."""


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the runs; default: a temporary one")
    parser.add_argument("--tokens", type=int, default=12_288, help="of each Stage II")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["online", "k32", "k256", "k32-hybrid"])
    parser.add_argument("--seed", type=int, default=0, help="of the students, the order of the data and what is drawn")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(sys.stderr):  # what the jobs say
        found = compare(options.folder or Path(temporary), options.tokens, options.ways, options.seed)
    print(json.dumps(found, indent=None if options.json else 2))


def compare(root: Path, tokens: int, ways: list[str], seed: int = 0) -> dict[str, Any]:
    """The figures of each way, and of the student before."""
    base, common = root / "base" / "jobs", [*COMMON, f"seed={seed}"]
    made(base, [*common, "stage=align"])
    given = [
        *common, f"distill.tokens={tokens}", "teacher.source=folder", "teacher.gguf_file=",
        f"teacher.path={(base / 'fetch/output/teacher').resolve()}",
        f"student.init_from={(base / 'align/output/student').resolve()}",
    ]  # fmt: skip
    # What is cached are the first samples; the online teacher gets the same, in shards of the same sizes.
    cache = root / "k32" / "jobs"
    made(cache, [*given, *WAYS["k32"], f"data.shards={(base / 'tokenize/output').resolve()}", "stage=cache"])
    held_out = HeldOut(base)
    found: dict[str, Any] = {"before": {"kl": held_out.kl(base / "align/output/student")}}
    for way in ways:
        jobs = root / way / "jobs"
        shards = cache / "cache/output" if way == "online" else base / "tokenize/output"
        settings = [*given, *WAYS[way], f"data.shards={shards.resolve()}"]
        if way in SHARED:
            take_cache(root / SHARED[way] / "jobs", jobs, settings)
        made(jobs, [*settings, "stage=distill"])
        found[way] = figures(jobs) | {"kl": held_out.kl(jobs / "distill-code/output/student")}
    return found


def made(jobs: Path, settings: list[str]) -> None:
    """The jobs of a graph, those that are not finished, one after another in this process."""
    config = compose(settings).config
    for job in plan(config):
        folder = JobFolder(jobs / job.name, job, config)
        if not state_of(folder.path, job).done:
            prepare(folder.path, job)
            folder.write()
            run_job(folder.path)
            gc.collect()


def take_cache(given: Path, jobs: Path, settings: list[str]) -> None:
    """Another run's targets, which differ in nothing but who reads them."""
    made(jobs, [*settings, "stage=fetch"])
    if not (jobs / "cache").exists():
        (jobs / "cache").symlink_to((given / "cache").resolve())


def figures(jobs: Path) -> dict[str, float]:
    """What the run says of its steps and its targets."""
    steps = [record for record in read_metrics(jobs / "distill-code") if "seconds" in record][1:]
    found = {
        name: round(statistics.median(step[key] for step in steps), 4)
        for name, key in (("step_s", "seconds"), ("teacher_s", "time/teacher"), ("data_s", "time/data"))
    }
    manifest = read_manifest(jobs / "cache/manifest.json")
    if manifest:
        facts = manifest.facts[SOURCE]
        found |= {"bytes_per_token": facts["train"]["bytes_per_token"], "capture_tokens_per_s": facts["tokens_per_s"]}
    return found


class HeldOut:
    """The teacher on held-out text."""

    def __init__(self, jobs: Path) -> None:
        batch = read_samples(jobs / "tokenize/output" / SOURCE / "validation", HELD_OUT)
        self.sample = Sample(batch.tokens, batch.mask)
        model = self._load(jobs / "fetch/output/teacher")
        self.reference = Reference(self._hidden(model), model.get_output_embeddings().weight.detach().clone())

    def kl(self, student: Path) -> float:
        """KL(teacher ‖ student) over the whole vocabulary, nats per token."""
        model = self._load(student)
        head = model.get_output_embeddings().weight.detach()
        return round(float(measure(self._hidden(model), head, self.sample, self.reference)["kl"]), 5)

    def _hidden(self, model: Any) -> torch.Tensor:
        return final_hidden(model, self.sample.tokens[:, :-1], 4)

    @staticmethod
    def _load(folder: Path) -> Any:
        from transformers import AutoModelForCausalLM

        import xlstm_distill.model  # noqa: F401  # registers the student

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
