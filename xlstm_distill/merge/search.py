"""λ by validation (paper §3.2: "light sweeps"): a small simplex of weights, under one method or several.

Every candidate is measured in memory (`merge.measure`) and kept in `checkpoints/search.jsonl`, so that a search goes
on where it was ended. The mean of all experts and every expert alone are always among them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from xlstm_distill.contract.files import append_line, read_lines, write_json
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.evaluate.suites import check_tasks
from xlstm_distill.merge.candidates import Candidate, candidates
from xlstm_distill.merge.measure import Meter
from xlstm_distill.merge.table import draw, table
from xlstm_distill.merge.weights import TensorWeights
from xlstm_distill.merge.write import Experts, Recipe
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag

Record = Mapping[str, Any]
"""`name`, `method`, `weights` of a candidate and what `Meter.measure` found."""


def choose(records: Sequence[Record]) -> tuple[int, str]:
    """Which candidate, and why.

    Without tasks: the lowest mean held-out KL. With tasks: of those whose mean score lies within one standard error
    below the best, the one with the lowest KL; the difference of their scores is noise.
    """
    kl = [r["mean_kl"] if math.isfinite(r["mean_kl"]) else math.inf for r in records]
    if not all("score" in record for record in records):
        best = min(range(len(records)), key=kl.__getitem__)
        return best, f"the lowest mean held-out KL, {kl[best]:.4f} nats per token, of {len(records)} candidates"
    top = max(records, key=lambda record: record["score"])
    near = [i for i, record in enumerate(records) if record["score"] >= top["score"] - top["stderr"]]
    best = min(near, key=kl.__getitem__)
    return best, (
        f"the lowest mean held-out KL, {kl[best]:.4f} nats per token, of the {len(near)} of {len(records)} candidates "
        f"whose mean score is within a standard error ({top['stderr']:.4f}) of the best ({top['score']:.4f})"
    )


def verdict(records: Sequence[Record]) -> dict[str, Any]:
    """What was chosen and why, beside the uniform mean and the best expert alone; each without its details."""
    chosen, why = choose(records)
    count = len(records[0]["weights"])
    alone = [record for record in records[: count + 1] if max(record["weights"].values()) == 1]
    short = ("name", "method", "weights", "mean_kl", "score")
    rows = {"chosen": records[chosen], "uniform": records[0], "best_single": alone[choose(alone)[0]]}
    return {
        "why": why,
        "candidates": len(records),
        **{role: {key: value for key, value in row.items() if key in short} for role, row in rows.items()},
    }


class Search:
    """One search of a merge job.

    Raises:
        Mistake: the held-out data is missing, or a task cannot be asked here.
    """

    def __init__(self, folder: JobFolder, experts: Experts, stop: StopFlag) -> None:
        self.folder, self.stop = folder, stop
        self.meter = Meter(folder, experts, stop)
        config = folder.config
        self.candidates = candidates(config.specialists, config.merge.search, config.merge.tried)
        for candidate in self.candidates:
            experts.check(self._recipe(candidate))
        check_tasks(self.meter.tasks, config.eval.allow_code_execution, "merge.tasks")
        self.units = self.meter.units * len(self.candidates)

    def run(self, metrics: Metrics) -> tuple[Recipe, dict[str, Any]]:
        """Measure what is not measured yet, write `search.json` and `search.png`, and return the recipe chosen with
        `verdict`."""
        done = 0

        def on_unit() -> None:
            nonlocal done
            self.stop.check()
            done += 1
            metrics.log(done)

        self.meter.on_unit = on_unit
        records: list[dict[str, Any]] = []
        for candidate in self.candidates:
            record = self._kept(candidate)
            if record is None:
                record = self._measure(candidate)
            done = self.meter.units * (len(records) + 1)
            records.append(record)
        found = verdict(records)
        chosen = choose(records)[0]
        print(table(records, chosen), found["why"], sep="\n", flush=True)
        held_out = {source: len(sample.tokens) for source, sample in self.meter.samples.items()}
        facts = {"held_out": held_out, "shared_with_eval": self.meter.shared}
        write_json(self.folder.output / "search.json", {**found, **facts, "records": records})
        draw(records, chosen, self.folder.output / "search.png")
        self.meter.clear()
        return self._recipe(self.candidates[chosen]), found

    def _recipe(self, candidate: Candidate) -> Recipe:
        settings = replace(self.folder.config.merge, method=cast(Any, candidate.method))
        return Recipe(TensorWeights(candidate.weights), settings, self.folder.config.seed)

    def _measure(self, candidate: Candidate) -> dict[str, Any]:
        self.meter.prepare()
        found = {"name": candidate.name, "method": candidate.method, "weights": dict(candidate.weights)}
        record = {**found, **self.meter.measure(self._recipe(candidate))}
        append_line(self.folder.checkpoints / "search.jsonl", {"made_from": self.meter.made_from, **record})
        return record

    def _kept(self, candidate: Candidate) -> dict[str, Any] | None:
        for line in read_lines(self.folder.checkpoints / "search.jsonl"):
            made_from = line.pop("made_from", "")
            same = (line.get("method"), line.get("weights")) == (candidate.method, dict(candidate.weights))
            if same and made_from == self.meter.made_from:
                return cast(dict[str, Any], line)
        return None
