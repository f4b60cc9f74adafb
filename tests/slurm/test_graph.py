"""The graph on a real Slurm: order, arrays, idempotence, the code and the words of the moment of submission."""

import json
import shutil

import pytest
from slurm_support import EXPERTS, ROOT, User

DISTILL = [f"distill-{name}" for name in EXPERTS]


def test_the_pipeline_of_four_experts_runs_in_the_order_of_the_graph(any_user: User) -> None:
    any_user.launch("--nodes", "2", "--gpus-per-node", "2", "cluster.stages.distill.segments=3")
    assert any_user.submissions() == sorted(["tokenize", "cache", "align", *DISTILL, "merge", "eval", "report"])
    any_user.until(lambda: any_user.done("report"), 180)
    any_user.until_ended("report")
    graph = json.loads((any_user.jobs.parent / "graph.json").read_text())
    records = {name: any_user.records(name) for name in any_user.ids()}
    # Time segments that were not needed are cancelled: they never ran.
    ran = {name: [r for r in found if r.state != "CANCELLED"] for name, found in records.items()}
    assert {name: len(found) for name, found in ran.items() if len(found) > 1} == {"tokenize": 4, "cache": 4, "eval": 8}
    assert all(r.state == "COMPLETED" and r.restarts == 0 for found in ran.values() for r in found)
    for upstream, job in graph["edges"]:
        if upstream in ran:
            assert max(r.end for r in ran[upstream]) <= min(r.start for r in ran[job]), f"{job} before {upstream}"
    assert max(ran[name][0].start for name in DISTILL) < min(ran[name][0].end for name in DISTILL)  # side by side
    assert {start["ranks"] for name in DISTILL for start in any_user.starts(name)} == {4}
    assert {job["state"] for job in any_user.status().values()} == {"done"}


@pytest.mark.parametrize("way", ["slurm", "submitit"])
def test_a_dry_run_prints_byte_for_byte_what_is_submitted(user: User, way: str) -> None:
    command = ["launch", "--name", user.run, f"cluster={way}", "teacher=tiny", "experts=[math,code]"]
    told = user.xdl(*command, "--dry-run")
    user.xdl(*command)
    ids = user.ids()
    assert len(ids) == 8
    for name, id in ids.items():
        told = told.replace(f"${{{name}}}", id)
    for name in ids:
        script = (user.jobs / name / "submit.sbatch").read_text()
        assert script in told, name
        if way == "submitit":
            (written,) = {path.read_text() for path in (user.jobs / name / "submitit").glob("**/*submission.sh")}
            assert written == script
            assert "wckey" not in written


@pytest.mark.repeated(10)
def test_the_same_launch_again_submits_nothing_twice(user: User) -> None:
    user.play(align={"hold": 2})
    together = [user.start("launch", "--name", "r", "cluster=slurm", "teacher=tiny") for _ in range(2)]
    said = ["".join(process.communicate(timeout=600)) for process in together]
    assert 0 in (process.returncode for process in together), said
    wanted = sorted(["tokenize", "cache", "align", *DISTILL, "merge", "eval", "report"])
    assert user.submissions() == wanted
    user.launch()
    assert user.submissions() == wanted
    user.go("align")
    user.until(lambda: user.done("report"), 600)
    assert "all 11 jobs are done" in user.launch()
    assert user.submissions() == wanted
    assert all(len(user.starts(name)) == 1 for name in ("align", *DISTILL, "merge", "report"))


@pytest.mark.repeated(10)
def test_a_requeued_element_restarts_alone(user: User) -> None:
    """The last of an array, whose own job id is the whole array's."""
    user.play(tokenize={"element": 3, "crash": 2, "times": 1, "pause": 0.3})
    user.launch("stage=tokenize")
    user.until(lambda: user.done("tokenize"))
    assert [r.restarts for r in user.until_ended("tokenize")] == [0, 0, 0, 1]
    assert sorted(start["element"] for start in user.starts("tokenize")) == [0, 1, 2, 3, 3]


def test_a_job_runs_the_code_of_the_moment_of_its_submission(user: User) -> None:
    checkout = user.folder / "checkout"
    for package in ("launcher", "xlstm_distill", "configs", "slurm"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = checkout / "xlstm_distill/stages.py"
    code.write_text(f"{code.read_text()}\nprint('as it was submitted')\n")  # not committed anywhere
    user.path = checkout
    user.play(tokenize={"hold": 2})
    user.launch("experts=[math]", "stage=align")
    code.write_text("raise SystemExit('as it is now')\n")
    user.until(lambda: user.starts("tokenize"))
    user.go("tokenize")
    user.until(lambda: user.done("align"))
    for job in ("tokenize", "align"):
        assert "as it was submitted" in user.said(job)
        assert "as it is now" not in user.said(job)
