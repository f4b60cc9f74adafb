"""Looking at a run and acting on it on a real Slurm: `xdl status`, `logs`, `stop`, `cancel` and `doctor`."""

from pathlib import Path

import yaml
from slurm_support import User

SLOW_NODE = """
import os
if os.environ.get("SLURMD_NODENAME") == "node1":
    from xlstm_distill.runtime import device
    device.measured_peak = lambda *arguments: 1e6
"""


def states(user: User) -> dict[str, tuple[str, str | None]]:
    return {name: (row["state"], row["reason"]) for name, row in user.status().items()}


def test_status_tells_what_runs_what_waits_and_what_failed_and_cancel_ends_it(any_user: User) -> None:
    any_user.play(distill_math={"hold": 2}, distill_code={"mistake": True})
    any_user.launch("experts=[math,code]", "stage=merge")
    any_user.until(lambda: any_user.checkpoint("distill-math") == 1)
    any_user.until(lambda: states(any_user)["distill-code"][0] == "failed")
    rows = any_user.status()
    assert {row["state"] for name, row in rows.items() if name in ("fetch", "tokenize", "cache", "align")} == {"done"}
    math, code, merge = rows["distill-math"], rows["distill-code"], rows["merge"]
    assert (math["state"], math["expert"], math["step"], math["total"], math["loss"]) == ("running", "math", 1, 3, 1.0)
    assert math["id"] == any_user.ids()["distill-math"]
    assert 0 <= math["checkpoint_age_s"] < 60
    assert (merge["state"], merge["reason"]) == ("waiting", "Dependency")
    assert (code["rank"], code["error"]) == (0, "distill-code: the stand-in's mistake")
    assert "error: distill-code: the stand-in's mistake" in any_user.xdl("logs", "r", "distill-code")
    assert "distill-math: cancelled" in any_user.xdl("cancel", "r")
    any_user.until(lambda: states(any_user)["distill-math"] == ("cancelled", None), what="the queue is empty")
    assert states(any_user)["merge"] == ("cancelled", None)
    assert any_user.status()["distill-code"]["state"] == "failed"


def test_a_stopped_job_wrote_its_checkpoint_and_a_launch_goes_on_from_there(user: User) -> None:
    user.play(align={"hold": 3})
    user.launch("experts=[math]", "stage=distill", "cluster.stages.align.segments=3")
    user.until(lambda: user.checkpoint("align") == 2)
    said = user.xdl("stop", "r")
    assert "align: will write a checkpoint" in said
    assert "distill-math: cancelled" in said
    assert "go on with: xdl launch --name r" in said
    user.until(lambda: states(user)["align"][0] == "stopped", what="align stops")
    assert user.checkpoint("align") == 3  # it makes the step that it was asked in
    user.play()
    user.launch("experts=[math]", "stage=distill")
    user.until(lambda: user.done("distill-math"))
    assert [start["at"] for start in user.starts("align")] == [0, 3]


def test_doctor_names_the_slow_node(user: User, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SLOW_NODE)
    user.stand_in = False
    user.environment["PYTHONPATH"] = f"{tmp_path / 'site'}:{user.path}"
    where = ("cluster=slurm", "teacher=tiny")
    said = user.xdl("doctor", "--nodes", "3", *where, code=1)
    assert "3 of 3 ranks reported" in said
    assert "node1: product 1e-06 TFLOP/s per rank" in said
    assert "cluster.sbatch.exclude=node" in said  # on a busy machine another node may be slow too


def test_the_proposed_site_is_this_cluster_and_can_be_launched_on(user: User) -> None:
    user.xdl("doctor", "--write-site", "here")
    site = yaml.safe_load((user.configs / "cluster/here.yaml").read_text())
    assert site["kind"] == "slurm"
    assert site["sbatch"]["partition"] == "main"
    assert site["gpu_flag"] == "gpus-per-node"
    assert site["stages"]["distill"] == {"cpus_per_task": 2}  # eight CPUs, four GPUs
    user.xdl("launch", "--name", "r", "stage=tokenize", "experts=[math]", "cluster=here", "teacher=tiny")
    user.until(lambda: user.done("tokenize"))
