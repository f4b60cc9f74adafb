"""What ends a job on a real Slurm, and what follows: preemption, dead nodes, crashes, mistakes, edited manifests."""

import json
import random
import time

import pytest
from slurm_support import EXPERTS, User

STEPS = 6


def launch_align(user: User) -> None:
    """An alignment on two nodes, tokenised data behind it; returns when it has a checkpoint and holds."""
    user.play(align={"steps": STEPS, "hold": 3})
    user.launch("--nodes", "2", "--gpus-per-node", "1", "stage=align")
    user.until(lambda: user.checkpoint("align") == 2)


def assert_resumed(user: User, *at: int) -> None:
    """The training goes on from its checkpoint, step after step, on all its ranks."""
    user.until(lambda: len(user.starts("align")) == 2)
    user.go("align")
    user.until(lambda: user.done("align"))
    assert user.until_ended("align")[0].restarts == 1
    first, second = user.starts("align")
    assert (first["ranks"], second["ranks"]) == (2, 2)
    assert first["at"] == 0
    assert second["at"] in at
    lines = (user.jobs / "align/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.repeated(20)
def test_a_preempted_job_saves_is_requeued_and_resumes(user: User) -> None:
    launch_align(user)
    every_node = ("--partition=high", "--exclusive", f"--nodes={len(user.cluster.nodes)}")
    high = user.cluster.run("sbatch", "--parsable", *every_node, "--output=/dev/null", "--wrap", "sleep 2").strip()
    user.until(lambda: user.records("", high)[0].state in ("RUNNING", "COMPLETED"), what="the urgent job starts")
    assert_resumed(user, 3)  # it makes the step that it was asked in
    first, *_ = (user.jobs / "align/ends").read_text().splitlines()
    assert first.split()[1::2] == ["0", "75"]  # it left by request, within the grace time


@pytest.mark.repeated(10)
@pytest.mark.parametrize("which", ["of the batch script", "of another rank"])
def test_a_job_whose_node_dies_is_requeued_and_resumes(user: User, which: str) -> None:
    launch_align(user)
    nodes = user.cluster.run("scontrol", "show", "hostnames", user.records("align")[0].fields["NodeList"]).split()
    node = nodes[0 if which == "of the batch script" else 1]
    user.cluster.crash(node)
    try:
        assert_resumed(user, 2, 3)  # a rank that lives is asked to stop, and makes its step
    finally:
        user.cluster.start_node(node)


@pytest.mark.soak
def test_fifty_signals_leave_fifty_jobs_that_go_on_from_their_checkpoints(user: User) -> None:
    """USR2 at random moments, long before the time limit, to four jobs that train."""
    jobs = [f"distill-{name}" for name in EXPERTS]
    user.play(**{name.replace("-", "_"): {"steps": 10**6, "pause": 0.1} for name in jobs})
    user.launch("stage=distill")
    for number in range(50):
        job = jobs[number % len(jobs)]
        user.until(lambda job=job: user.starts(job) and user.checkpoint(job) > user.starts(job)[-1]["at"])
        starts = len(user.starts(job))
        time.sleep(random.random())
        before = user.checkpoint(job)
        user.cluster.run("scancel", "--signal=USR2", user.ids()[job])
        user.until(lambda job=job, n=starts: len(user.starts(job)) > n)
        assert user.starts(job)[-1]["at"] >= before
    user.xdl("cancel", user.run)


def test_a_job_that_crashes_again_and_again_is_given_up_after_three_restarts(user: User) -> None:
    """While a crashed segment waits to start again, the next one may: the restarts of all of them count."""
    user.play(align={"crash": 1})
    user.launch("stage=align", "cluster.stages.align.segments=2")
    user.until(lambda: len(user.starts("align")) == 4)
    user.until(lambda: {record.state for record in user.records("align")} == {"FAILED", "CANCELLED"})
    assert "crashed 4 times without a new checkpoint" in user.said("align")
    assert len(user.starts("align")) == 4


def test_a_job_that_makes_a_checkpoint_between_crashes_is_started_as_often_as_it_takes(user: User) -> None:
    user.play(align={"crash": 2, "steps": 5})
    user.launch("stage=align")
    user.until(lambda: user.done("align"))
    assert [start["at"] for start in user.starts("align")] == [0, 1, 2, 3, 4]
    assert user.until_ended("align")[0].restarts == 4


def test_a_crashed_segment_whose_successor_finishes_does_no_harm(user: User) -> None:
    """Where compute nodes have no scontrol a crash cannot be requeued: the next segment goes on."""
    user.play(distill_math={"crash": 3, "times": 1})
    without = r"cluster.setup=['scontrol() { return 1; }']"
    user.launch("experts=[math,code]", "cluster.stages.distill.segments=2", without)
    user.until(lambda: user.done("report"), 600)
    assert [record.state for record in user.records("distill-math")] == ["FAILED", "COMPLETED"]
    assert [start["at"] for start in user.starts("distill-math")] == [0, 2]


def test_merge_ends_at_once_and_names_the_expert_that_failed_for_good(any_user: User) -> None:
    """The same command, after the failure is mended, submits that expert and the merge alone."""
    user = any_user
    user.play(distill_stem={"mistake": True})
    user.launch("stage=merge")
    (merge,) = user.until_ended("merge", "FAILED", 600)
    experts = [user.records(f"distill-{name}")[0] for name in ("math", "code", "stem", "chat")]
    assert [record.state for record in experts] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    assert merge.fields["ExitCode"] == "2:0"
    assert merge.end - merge.start <= 30
    assert "merge: needs distill-stem, which is not finished" in user.said("merge")

    told = user.status()
    assert told["distill-stem"]["state"] == told["merge"]["state"] == "failed"
    assert (told["distill-stem"]["rank"], told["distill-stem"]["expert"]) == (0, "stem")
    assert told["distill-stem"]["error"] == "distill-stem: the stand-in's mistake"
    table = user.xdl("status", "r")
    assert "distill-stem: rank 0: distill-stem: the stand-in's mistake" in table

    before = user.submissions()
    user.play()
    user.launch("stage=merge")
    anew = ["distill-stem", "merge"]
    assert {name: id for name, id in user.ids().items() if name not in anew}.keys() == set(before) - set(anew)
    assert user.submissions() == sorted([*before, *anew])
    user.until(lambda: user.done("merge"))


EDITS = {
    "its settings": lambda manifest: manifest["identity"].update(seed=7),
    "its outputs": lambda manifest: manifest["outputs"]["result"].update(xxh64="0" * 16),
    "its inputs": lambda manifest: manifest["inputs"].update(align="0" * 16),
    "its format": lambda manifest: manifest.clear(),
}


@pytest.mark.parametrize("what", EDITS)
def test_merge_refuses_a_manifest_that_was_changed_by_hand(user: User, what: str) -> None:
    user.play(distill_code={"hold": 2})
    user.launch("experts=[math,code]", "stage=merge")
    user.until(lambda: user.done("distill-math") and user.starts("distill-code"))
    path = user.jobs / "distill-math/manifest.json"
    manifest = json.loads(path.read_text())
    EDITS[what](manifest)
    path.write_text(json.dumps(manifest))
    user.go("distill-code")
    user.until_ended("merge", "FAILED")
    assert not user.done("merge")
    last = user.said("merge").strip().splitlines()
    assert any("error: " in line and ("math" in line) for line in last), last
