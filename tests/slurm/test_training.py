"""The real stages on a Slurm cluster: ranks of torch on eight nodes, a time limit in the middle, a whole pipeline."""

import os
import shutil
from pathlib import Path

import pytest
from cluster import SlurmCluster
from slurm_support import EXPERTS, ROOT, User

from xlstm_distill.contract import ledger
from xlstm_distill.contract.files import read_lines
from xlstm_distill.contract.manifest import read_manifest

pytestmark = pytest.mark.slow
TINY = ["teacher=tiny", "experts=[fox]", "align.batch=8"]
STEPS, TOKENS_PER_STEP = 100, 4 * 128
# Through submitit, processes start without a rank.
PLACES = """
import atexit, os

@atexit.register
def tell():
    if "RANK" in os.environ:
        with open(f"{os.environ['PLACES']}/rank-{os.environ['RANK']}", "w") as file:
            file.write(os.uname().nodename)
"""
# Its time limit, of minutes, shall come in the middle of a training, and the second start reach the end.
SLOW_FIRST_START = """
import os, time
from xlstm_distill.runtime.stop import StopFlag

def slowly(flag, also=False, plain=StopFlag.requested):
    time.sleep(1.4)
    return plain(flag, also)

if os.environ.get("SLURM_ARRAY_TASK_ID", "0") == "0" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    StopFlag.requested = slowly
"""


def four_experts(folder: Path) -> list[str]:
    """Settings of experts on the two sources of the tiny recipe, each with a mixture of its own."""
    settings = [f"experts=[{','.join(EXPERTS)}]"]
    for name, fox in zip(EXPERTS, (0.2, 0.4, 0.6, 0.8), strict=True):
        for source, weight in (("fox", fox), ("sea", 1 - fox)):
            value = f"{{weight: {weight:.1f}, kind: jsonl, path: {folder}/{source}.jsonl}}"
            settings.append(f"expert.{name}.sources.{source}={value}")
    return settings


def trainer(cluster: SlurmCluster, aligned: Path, folder: Path, site: str) -> User:
    """Who goes on with a copy of the aligned run; each process runs `site` as it starts."""
    if not cluster.hostnames:
        told = "ranks find each other by the names of their nodes, which takes root here"
        pytest.fail(told) if os.environ.get("XDL_REQUIRE_SLURM") == "1" else pytest.skip(told)
    shutil.copytree(aligned / "runs", folder / "runs")
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(site)
    path = f"{folder / 'site'}:{ROOT}"
    return User(cluster, folder, aligned / "configs", stand_in=False, environment={"PYTHONPATH": path})


def assert_ranks_distil(cluster: SlurmCluster, aligned: Path, folder: Path, nodes: int, way: str) -> User:
    """An expert, with a rank on each of so many nodes: each is where it should be, and the student gets better."""
    user = trainer(cluster, aligned, folder, PLACES)
    user.environment["PLACES"] = str(folder)
    where = ["--nodes", str(nodes), "--gpus-per-node", "1", "--name", "r", f"cluster={way}"]
    steps = ["distill.batch=8", "distill.micro_batch=1", "distill.tokens=20480"]
    user.xdl("launch", *where, *TINY, "stage=distill", *steps)
    assert user.ids().keys() == {"distill-fox"}
    user.until(lambda: user.records("distill-fox")[0].state not in ("PENDING", "RUNNING", "COMPLETING"), 600)
    (record,) = user.until_ended("distill-fox")
    assert (record.fields["NumNodes"], record.restarts) == (str(nodes), 0)
    job = user.jobs / "distill-fox"
    assert [start["ranks"] for start in ledger.starts(job)] == [nodes]
    allocated = cluster.run("scontrol", "show", "hostnames", record.fields["NodeList"]).split()
    places = {path.name: path.read_text() for path in folder.glob("rank-*")}
    assert places == {f"rank-{rank}": node for rank, node in enumerate(allocated)}
    metrics = read_lines(job / "metrics.jsonl")
    assert metrics[-1]["loss"] < 0.9 * metrics[1]["loss"]
    validation = read_manifest(job / "manifest.json").facts["validation"]
    assert validation["end"]["fox"]["kl"] < validation["start"]["fox"]["kl"]
    assert list((job / "tensorboard").glob("events*"))
    return user


def assert_broken_off_ends_as_whole(
    cluster: SlurmCluster, aligned: Path, folder: Path, segments: int, way: str
) -> tuple[User, list[int]]:
    """An expert over its time limit ends like one within it; its user, and the steps that its starts went on from."""
    runs = {}
    for name, limit, site in (("whole", "10", ""), ("broken", "2", SLOW_FIRST_START)):
        user = runs[name] = trainer(cluster, aligned, folder / name, site)
        where = ["--nodes", "2", "--gpus-per-node", "1", "--time", limit, "--name", "r", f"cluster={way}"]
        stop = [f"cluster.stages.distill.segments={segments}", "cluster.signal_seconds=20"]
        user.xdl("launch", *where, *TINY, "stage=distill", *stop, f"distill.tokens={STEPS * TOKENS_PER_STEP}")
    for user in runs.values():
        user.until(lambda: user.done("distill-fox"), 300)  # noqa: B023
    jobs = {name: user.jobs / "distill-fox" for name, user in runs.items()}
    starts = {name: [start["step"] for start in ledger.starts(job)] for name, job in jobs.items()}
    assert starts["whole"] == [0]
    losses = [[line["loss"] for line in read_lines(job / "metrics.jsonl") if "loss" in line] for job in jobs.values()]
    assert len(losses[0]) >= STEPS
    assert losses[0] == losses[1]
    whole, broken = (read_manifest(job / "manifest.json") for job in jobs.values())
    assert whole.facts["validation"] == broken.facts["validation"]
    assert whole.outputs == broken.outputs
    return runs["broken"], starts["broken"]


def test_eight_ranks_on_eight_nodes_distil(any_cluster: SlurmCluster, aligned: Path, tmp_path: Path) -> None:
    assert_ranks_distil(any_cluster, aligned, tmp_path, 8, "slurm")


def test_an_expert_over_its_time_limit_ends_as_if_it_had_not_been_broken_off(
    cluster: SlurmCluster, aligned: Path, tmp_path: Path
) -> None:
    user, starts = assert_broken_off_ends_as_whole(cluster, aligned, tmp_path, 2, "slurm")
    assert len(starts) == 2
    assert 0 < starts[1] < STEPS
    assert [r.state for r in user.until_ended("distill-fox")] == ["COMPLETED", "COMPLETED"]


def test_a_pipeline_of_four_experts_makes_the_merged_model_and_the_report(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """One rank per job; no job begins before all that it reads has ended."""
    from test_pipeline import write_configs

    write_configs(tmp_path)
    user = User(cluster, tmp_path, tmp_path / "configs", stand_in=False)
    user.launch(*four_experts(tmp_path), "eval.models=[teacher,merged]", "align.tokens=7680", "distill.tokens=7680")
    user.until(lambda: user.done("report"), 600)
    user.until_ended("report")
    records = {name: user.records(name) for name in user.ids()}
    experts = [f"distill-{name}" for name in EXPERTS]
    assert records.keys() == {"tokenize", "cache", "align", *experts, "merge", "eval", "report"}
    assert {r.state for found in records.values() for r in found} == {"COMPLETED"}
    reads = {"cache": ["tokenize"], "align": ["tokenize"], "merge": experts, "eval": ["merge"], "report": ["eval"]}
    for job, inputs in (reads | {name: ["align", "cache"] for name in experts}).items():
        ended = max(record.end for name in inputs for record in records[name])
        assert ended <= min(record.start for record in records[job]), job
    assert max(records[name][0].start for name in experts) < min(records[name][0].end for name in experts)
    assert (user.jobs / "merge/output/student/model-00001.safetensors").exists()
    assert "merged" in (user.jobs / "report/output/report.md").read_text()
    told = user.status()
    assert {job["state"] for job in told.values()} == {"done"}
    assert told.keys() == {"fetch"} | records.keys()  # fetch runs where `xdl launch` does
