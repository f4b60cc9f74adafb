"""An evaluation on several ranks measures what one rank measures; what one rank cannot do is a failed task; all stop
together."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_support import config, finished_run
from ranks import start

from xlstm_distill.contract.exitcode import MISTAKE, STOPPED
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.data.shards import sample, shard_writer

pytestmark = pytest.mark.dist
TASKS = ("local_needle_single", "local_needle_multi_choice", "local_addition", "local_positions")
# On one rank only, whatever it is asked to write.
UNABLE = """
import os
if os.environ["RANK"] == "1":
    from xlstm_distill.evaluate import lm
    whole = lm._answer
    def answer(kind):
        def fails(lm, groups):
            raise RuntimeError("CUDA out of memory")
        return fails if kind == "generate_until" else whole(kind)
    lm._answer = answer
"""
# Every answer takes a while.
SLOW = """
import time
from xlstm_distill.evaluate import lm
whole = lm._answer
def answer(kind):
    inner = whole(kind)
    def slowly(lm, groups):
        time.sleep(0.5)
        return inner(lm, groups)
    return slowly
lm._answer = answer
"""


def make_eval(run: Path, tasks: tuple[str, ...] = TASKS) -> JobFolder:
    """7 held-out sequences: on two ranks the last round leaves one without any."""
    settings = config(tasks)
    settings = replace(settings, eval=replace(settings.eval, limit=5, samples=7, batch=2, lengths=(400,)))
    folder = finished_run(run, settings)
    rng = np.random.default_rng(0)
    shards = folder.input("tokenize") / "prose" / "validation"
    shards.parent.mkdir(parents=True)
    with shard_writer(shards, 96, 1 << 14) as writer:
        for number in range(14):
            tokens = rng.integers(2, 258, 97)
            writer.write(sample(tokens, rng.random(97) < 0.9, np.full(97, number)))
    JobFolder.read(folder.sibling("tokenize")).finish({})
    JobFolder.read(folder.sibling("align")).finish(read_manifest(folder.sibling("align") / "manifest.json").facts)
    return folder


def measured(folder: JobFolder) -> dict:
    """Everything that was written, but for times and places."""
    found = {}
    for file in sorted(folder.output.glob("*/*.json*")):
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.suffix == ".jsonl" else []
        whole = {} if lines else json.loads(file.read_text())
        about = whole.get("xdl", {}).get("score", whole if file.stem == "heldout" else {})
        found[f"{file.parent.name}/{file.name}"] = (
            about,
            whole.get("positions"),
            [(s["id"], s["score"]) for s in lines],
        )
    return found


def near(a: object, b: object) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(near, a, b))
    return b == pytest.approx(a, rel=1e-4, abs=1e-6) if isinstance(a, float) else a == b


def test_two_ranks_measure_what_one_measures(tmp_path):
    alone, both = make_eval(tmp_path / "a" / "one"), make_eval(tmp_path / "b" / "two")
    start([alone], 1).wait()
    start([both], 2).wait()
    one, two = measured(alone), measured(both)
    assert len(one) == 2 * (1 + 2 * len(TASKS))
    assert near(one, two)
    samples = one["aligned/local_needle_single_400.samples.jsonl"][2]
    assert [identity for identity, _ in samples] == ["0", "1", "2", "3", "4"]
    assert all(read_manifest(both.piece_path(name)) for name in both.job.pieces)


def test_what_one_rank_cannot_do_is_a_failed_task_and_the_others_are_kept(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(UNABLE)
    folder = make_eval(tmp_path / "runs" / "one", ("local_needle_multi_choice", "local_addition"))
    ranks = start([folder], 2, path=tmp_path)
    deadline = time.monotonic() + 240
    while any(process.poll() is None for process in ranks.processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    said = ranks.said()
    ranks.kill()
    assert [process.returncode for process in ranks.processes] == [MISTAKE, 0], said
    line = "RuntimeError: CUDA out of memory"
    assert f"error: eval: 2 failed: local_addition of teacher ({line}); local_addition of aligned ({line})" in said
    written = json.loads((folder.output / "aligned" / "local_addition.json").read_text())
    assert (written.keys(), written["xdl"]["failed"]) == ({"xdl"}, line)
    assert "score" in json.loads((folder.output / "aligned" / "local_needle_multi_choice_400.json").read_text())["xdl"]


def test_a_signal_to_one_rank_stops_all_and_finished_tasks_are_kept(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    folder = make_eval(tmp_path / "runs" / "one", ("local_needle_multi_choice", "local_addition"))
    ranks = start([folder], 2, path=tmp_path)
    first = folder.output / "teacher" / "local_needle_multi_choice_400.json"
    ranks.until(first.exists, code=STOPPED)
    ranks.processes[1].send_signal(signal.SIGUSR2)
    ranks.wait(STOPPED)
    kept = first.stat().st_mtime_ns
    start([folder], 1).wait()
    assert first.stat().st_mtime_ns == kept
    assert read_manifest(folder.manifest_path) is not None
