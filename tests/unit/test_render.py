"""Batch scripts: their text is pinned by golden files, and their protocol is played through with stubs of Slurm."""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.compose import compose
from launcher.plan import plan
from launcher.render import Site, array_of, quote, render
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.schema import Cluster, Placement

GOLDEN = Path(__file__).parents[1] / "golden"
SITE = Site(
    "demo",
    Path("/runs/demo"),
    "/opt/python",
    Path("/runs/demo/code/abc"),
    mounts=("/runs/demo", "/data/my shards"),
    provenance=("made by: xdl launch cluster=slurm", "version 0.1.0; settings 0123456789abcdef"),
)
PLAIN = Job("merge", "merge", {}, ("distill-math",))
PIECES = Job("cache", "cache", {}, ("tokenize",), pieces=("a", "b", "c"), placement=Placement(gpus_per_node=1))
SEGMENTS = Job(
    "distill-math",
    "distill",
    {},
    ("align",),
    "math",
    placement=Placement(nodes=8, gpus_per_node=4, time="1-00:00:00", segments=3, memory="64G", partition="big"),
)
FULL = Cluster(
    sbatch={"account": "me", "qos": "long", "constraint": "h100&ib", "exclude": "node[3,5]", "exclusive": ""},
    gpu_flag="gres",
    setup=("module load cuda", "export A=1"),
    scratch="/local/my disk",
)
PYXIS = Cluster(container="pyxis", image="nvcr.io#nvidia/pytorch:25.09-py3")
APPTAINER = Cluster(container="apptainer", image="/images/py torch.sif")


@pytest.mark.parametrize(
    ("name", "job", "cluster"),
    [
        ("plain", PLAIN, Cluster()),
        ("pieces", PIECES, Cluster(sbatch={"partition": "p"})),
        ("segments", SEGMENTS, FULL),
        ("pyxis", SEGMENTS, PYXIS),
        ("apptainer", PIECES, APPTAINER),
    ],
)
def test_the_script_is_the_golden_one(name: str, job: Job, cluster: Cluster) -> None:
    text = render(job, cluster, SITE)
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("XDL_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_every_stage_of_every_recipe_renders_to_valid_bash() -> None:
    for teacher in ("smollm2-135m", "llama-3.1-8b-instruct"):
        config = compose([f"teacher={teacher}", "cluster=slurm"]).config
        for job in plan(config):
            text = render(job, config.cluster, SITE)
            assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
            assert "--signal=USR2@120\n" in text
            assert "--open-mode=append" in text


def test_pieces_and_segments_become_arrays() -> None:
    assert array_of(PLAIN) == ""
    assert array_of(PIECES) == "0-2"
    assert array_of(SEGMENTS) == "0-2%1"
    assert array_of(replace(SEGMENTS, placement=Placement())) == ""


def test_values_are_quoted_and_line_breaks_refused() -> None:
    odd = replace(SITE, folder=Path("/my runs/$(touch x)/it's 100%"))
    text = render(PLAIN, Cluster(sbatch={"account": "a b;c"}), odd)
    assert "#SBATCH --account='a b;c'" in text
    assert "JOB='/my runs/$(touch x)/it'\"'\"'s 100%/jobs/merge'" in text
    assert "100%%/jobs/merge/logs/slurm-%j.log" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    for sign in "\n\0\r":
        with pytest.raises(Mistake, match="line break or a NUL"):
            quote(f"a{sign}b")
        with pytest.raises(Mistake):
            render(PLAIN, Cluster(sbatch={"partition": f"a{sign}b"}), SITE)


def test_a_folder_whose_name_slurm_would_change_is_refused() -> None:
    with pytest.raises(Mistake, match="name with a backslash"):
        render(PLAIN, Cluster(), replace(SITE, folder=Path("/runs/back\\slash")))


STUB = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0")" in
    srun) exit "${SRUN_CODE:-0}" ;;
    squeue) echo "${END:-2099-01-01T00:00:00}" ;;
    scontrol) if [ "$1" = show ]; then echo node7; else exit "${REQUEUE_CODE:-0}"; fi ;;
    python) exit "${PREPARE_CODE:-0}" ;;
esac
"""


def play(tmp_path: Path, job: Job, cluster: Cluster | None = None, **environment: str) -> tuple[int, list[str]]:
    """Run the script of `job` among stubs of Slurm's commands; its exit code and what it called."""
    stubs, calls = tmp_path / "stubs", tmp_path / "calls"
    stubs.mkdir(exist_ok=True)
    calls.write_text("")
    for name in ("srun", "squeue", "scontrol", "scancel", "python"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    site = Site("demo", tmp_path, str(stubs / "python"), tmp_path / "code")
    (tmp_path / "jobs" / job.name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "code").mkdir(exist_ok=True)
    script = tmp_path / "job.sbatch"
    script.write_text(render(job, cluster or Cluster(), site))
    slurm = {
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_ARRAY_JOB_ID": "40",
        "SLURM_ARRAY_TASK_ID": "0",
    }
    variables = {"PATH": f"{stubs}:{os.environ['PATH']}", "CALLS": str(calls), **slurm, **environment}
    code = subprocess.run(["bash", str(script)], env=variables, capture_output=True, check=False).returncode
    return code, calls.read_text().splitlines()


def test_a_job_whose_code_is_gone_does_not_run_other_code(tmp_path: Path) -> None:
    site = Site("demo", tmp_path, "/bin/false", tmp_path / "it's gone")
    text = render(PLAIN, Cluster(), site).replace("${SLURM_RESTART_COUNT:-0}", "0")
    answer = subprocess.run(
        ["bash"], input=text, env={"SLURM_JOB_ID": "7"}, text=True, capture_output=True, check=False
    )
    assert answer.returncode == 2
    assert f"error: {tmp_path}/it's gone is gone" in answer.stderr


def test_a_finished_job_cancels_its_spare_segments(tmp_path: Path) -> None:
    assert play(tmp_path, PLAIN)[0] == 0
    code, calls = play(tmp_path, SEGMENTS)
    assert code == 0
    assert calls[-1] == "scancel --state=PENDING 40"


def test_a_spare_segment_of_a_finished_job_ends_at_once(tmp_path: Path) -> None:
    code, calls = play(tmp_path, SEGMENTS, PREPARE_CODE="3")
    assert code == 0
    assert not any(call.startswith("srun") for call in calls)


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    for environment in ({"SRUN_CODE": "2"}, {"PREPARE_CODE": "2"}):
        code, calls = play(tmp_path, SEGMENTS, **environment)
        assert code == 2
        assert not any("requeue" in call for call in calls)


def test_a_stop_near_the_time_limit_leaves_the_rest_to_the_next_segment(tmp_path: Path) -> None:
    near = {"SRUN_CODE": "75", "END": "2001-01-01T00:00:00"}
    code, calls = play(tmp_path, SEGMENTS, **near)
    assert code == 0
    assert not any("requeue" in call for call in calls)
    assert play(tmp_path, SEGMENTS, **near, SLURM_ARRAY_TASK_ID="2")[0] == 1
    assert play(tmp_path, PLAIN, **near)[0] == 1


def test_a_stop_is_near_the_limit_when_it_left_as_much_time_as_a_stop_was_measured_to_need(tmp_path: Path) -> None:
    ends = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 600))
    _, calls = play(tmp_path, SEGMENTS, SRUN_CODE="75", END=ends)
    assert calls[-1] == "scontrol requeue 40_0"
    (tmp_path / "jobs/distill-math/stop.json").write_text('{"seconds": 570.5}')
    code, calls = play(tmp_path, SEGMENTS, SRUN_CODE="75", END=ends)
    assert code == 0
    assert not any("requeue" in call for call in calls)


@pytest.mark.parametrize("name", ["crashes", "begun"])
def test_a_full_disk_does_not_start_a_crashing_job_for_ever(tmp_path: Path, name: str) -> None:
    (tmp_path / "jobs/distill-math" / name).mkdir(parents=True)  # what cannot be written
    code, calls = play(tmp_path, SEGMENTS, SRUN_CODE="137")
    assert code == 1
    assert not any("requeue" in call for call in calls)


def test_set_up_lines_may_read_variables_that_are_not_set(tmp_path: Path) -> None:
    setup = Cluster(setup=("export LIBRARIES=/x:$NOBODY_SETS_THIS",))
    code, calls = play(tmp_path, PLAIN, setup)
    assert code == 0
    assert any(call.startswith("srun") for call in calls)


def test_options_about_gpus_go_to_jobs_with_gpus_only() -> None:
    typed = Cluster(sbatch={"gres": "gpu:a100:4", "account": "a"})
    without = replace(SEGMENTS, placement=replace(SEGMENTS.placement, gpus_per_node=0))
    assert "#SBATCH --gres=gpu:a100:4\n" in render(SEGMENTS, typed, SITE)
    text = render(without, typed, SITE)
    assert "gres" not in text
    assert "#SBATCH --account=a\n" in text
    assert "gpus" not in render(SEGMENTS, Cluster(gpu_flag="none"), SITE)


def test_a_stop_long_before_the_limit_is_a_preemption_and_requeues_this_element(tmp_path: Path) -> None:
    code, calls = play(tmp_path, SEGMENTS, SRUN_CODE="75", SLURM_ARRAY_TASK_ID="1")
    assert code == 0
    assert calls[-1] == "scontrol requeue 40_1"
    code, calls = play(tmp_path, PLAIN, SRUN_CODE="75")
    assert (code, calls[-1]) == (0, "scontrol requeue 42")
    assert play(tmp_path, SEGMENTS, SRUN_CODE="75", REQUEUE_CODE="1")[0] == 0


def test_a_stop_by_its_file_is_neither_requeued_nor_left_to_the_next_segment(tmp_path: Path) -> None:
    for job in (PLAIN, SEGMENTS):
        (tmp_path / "jobs" / job.name).mkdir(parents=True)
        (tmp_path / "jobs" / job.name / "stop").touch()
        code, calls = play(tmp_path, job, SRUN_CODE="75")
        assert code == 1
        assert not any("requeue" in call for call in calls)


def test_a_crash_is_tried_again_until_it_makes_no_progress(tmp_path: Path) -> None:
    latest = tmp_path / "jobs/distill-math/checkpoints/latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step-1\n")
    crash = {"SRUN_CODE": "137"}
    assert [play(tmp_path, SEGMENTS, **crash)[0] for _ in range(4)] == [0, 0, 0, 1]
    latest.write_text("step-2\n")
    code, calls = play(tmp_path, SEGMENTS, **crash)
    assert (code, calls[-1]) == (0, "scontrol requeue 40_0")
    assert play(tmp_path, PLAIN, **crash, REQUEUE_CODE="1")[0] == 1


def test_a_crash_before_the_first_checkpoint_is_tried_again_three_times(tmp_path: Path) -> None:
    for job in (PLAIN, SEGMENTS):
        assert [play(tmp_path, job, SRUN_CODE="1")[0] for _ in range(4)] == [0, 0, 0, 1]


def test_a_job_that_is_started_again_and_again_without_a_new_checkpoint_is_given_up(tmp_path: Path) -> None:
    preempted = {"SRUN_CODE": "75"}
    assert [play(tmp_path, SEGMENTS, **preempted)[0] for _ in range(11)] == [0] * 10 + [1]
    latest = tmp_path / "jobs/distill-math/checkpoints/latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step-1\n")
    assert play(tmp_path, SEGMENTS, **preempted)[0] == 0


def test_the_ranks_get_their_place_from_slurm(tmp_path: Path) -> None:
    code, calls = play(tmp_path, PIECES, SLURM_RESTART_COUNT="2")
    assert code == 0
    srun = next(call for call in calls if call.startswith("srun"))
    assert "--open-mode=append" in srun
    text = render(PIECES, Cluster(), SITE)
    assert 'export XDL_ELEMENT="$SLURM_ARRAY_TASK_ID" XDL_ELEMENTS=3' in text
    assert 'export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"' in text
