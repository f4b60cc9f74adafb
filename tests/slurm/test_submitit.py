"""The same jobs through submitit: ranks and arrays, a time limit, a preemption; a training for real."""

from pathlib import Path

import pytest
from cluster import SlurmCluster
from slurm_support import User
from test_training import STEPS, assert_broken_off_ends_as_whole, assert_ranks_distil

TRAIN = ["stage=distill", "experts=[math]"]


def launch(user: User, *arguments: str) -> str:
    return user.xdl("launch", *arguments, "--name", user.run, "cluster=submitit", "teacher=tiny")


def test_ranks_arrays_and_dependencies_are_those_of_sbatch(user: User) -> None:
    said = launch(user, "--nodes", "4", "--gpus-per-node", "2", "experts=[math,code]")
    assert "report: submitted as" in said
    user.until(lambda: user.done("report"), 600)
    assert {start["ranks"] for start in user.starts("distill-math")} == {8}
    assert len(user.records("tokenize")) == 4
    assert (user.jobs / "cache/logs/rank-0.element-1.log").exists()
    assert user.records("distill-math")[0].start >= user.records("align")[0].end
    assert "Comment" not in user.records("align")[0].fields
    assert user.records("merge")[0].start >= max(user.records(f"distill-{n}")[0].end for n in ("math", "code"))
    assert {job["state"] for job in user.status().values()} == {"done"}
    assert "all 9 jobs are done" in launch(user, "experts=[math,code]")


def test_a_job_over_its_time_limit_is_requeued_and_goes_on(user: User) -> None:
    user.play(distill_math={"steps": 70, "pause": 0.5})
    launch(user, "--time", "1", *TRAIN, "cluster.signal_seconds=20", "cluster.stages.distill.segments=4")
    user.until(lambda: user.done("distill-math"), 150)
    at = [start["at"] for start in user.starts("distill-math")]
    assert at[0] == 0
    assert at == sorted(set(at))  # each start goes on from the one before; two where nothing else slows this machine
    assert user.records("distill-math")[0].restarts == len(at) - 1 >= 1


def test_a_preempted_job_is_requeued_and_goes_on(user: User) -> None:
    user.play(distill_math={"steps": 9, "hold": 6, "pause": 0.1})
    launch(user, "--nodes", "8", "--time", "01:00:00", *TRAIN)
    user.until(lambda: user.checkpoint("distill-math") == 5)
    every_node = ("--partition=high", "--exclusive", f"--nodes={len(user.cluster.nodes)}")
    other = user.cluster.run("sbatch", "--parsable", *every_node, "--output=/dev/null", "--wrap", "sleep 2").strip()
    user.until(lambda: user.records("", other)[0].state in ("RUNNING", "COMPLETED"))
    user.go("distill-math")
    user.play(distill_math={"steps": 9})
    user.until(lambda: user.done("distill-math"), 600)
    assert [start["at"] for start in user.starts("distill-math")] == [0, 6]
    assert user.records("distill-math")[0].restarts == 1


@pytest.mark.slow
def test_four_ranks_on_four_nodes_distil(cluster: SlurmCluster, aligned: Path, tmp_path: Path) -> None:
    user = assert_ranks_distil(cluster, aligned, tmp_path, 4, "submitit")
    assert (user.jobs / "distill-fox/submitit").is_dir()


@pytest.mark.slow
def test_an_expert_over_its_time_limit_ends_as_if_it_had_not_been_broken_off(
    cluster: SlurmCluster, aligned: Path, tmp_path: Path
) -> None:
    """submitit requeues the same job; once or, where something else slows this machine, more often."""
    user, starts = assert_broken_off_ends_as_whole(cluster, aligned, tmp_path, 4, "submitit")
    assert starts == sorted({*starts, 0})
    assert len(starts) >= 2
    assert starts[-1] < STEPS
    (record,) = user.until_ended("distill-fox")
    assert record.restarts == len(starts) - 1
