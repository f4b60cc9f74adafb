"""The Slurm backend among stubs of sbatch, squeue and scontrol."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends import local, slurm
from launcher.backends.queue import clean_environment
from launcher.cli import main
from launcher.compose import compose
from launcher.runs import read_graph
from launcher.snapshot import snapshot_folder
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.schema import Cluster, Placement

FAKE = Path(__file__).with_name("fake_stage.py")
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0")" in
    sbatch) [ -n "$REFUSE" ] && { echo "sbatch: error: $REFUSE" >&2; exit 1; }
            n=$(($(cat "$COUNT" 2>/dev/null || echo 100) + 1)); echo $n >"$COUNT"; echo "$n;cluster" ;;
    squeue) case "$*" in
                *%o*) printf '%s' "$LOST" ;;
                *) for id in $QUEUED; do
                       grep -qxs "$id" "$COUNT.gone" || echo "$id|$id|${STATE:-PENDING}|Priority"
                   done ;;
            esac ;;
    scancel) printf '%s\\n' "$@" >>"$COUNT.gone" ;;
    scontrol) echo "Slurmctld(primary) at here is ${PING:-UP}" ;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    monkeypatch.setattr(local, "command_of", lambda folder: [sys.executable, str(FAKE), str(folder.path)])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "calls"


def submissions(calls: Path) -> list[str]:
    return [line for line in calls.read_text().splitlines() if line.startswith("sbatch")]


def test_merge_waits_for_the_end_of_its_experts_and_the_others_for_success() -> None:
    ids = {"distill-math": "7", "distill-code": "8", "align": "5", "merge": "9"}
    merge = Job("merge", "merge", {}, ("distill-math", "distill-code"))
    assert slurm.dependency(merge, Cluster(), ids) == ["--dependency=afterany:7:8"]
    distill = Job("distill-math", "distill", {}, ("fetch", "align"))
    assert slurm.dependency(distill, Cluster(), ids) == ["--dependency=afterok:5", "--kill-on-invalid-dep=yes"]
    assert slurm.dependency(distill, Cluster(), {}) == []


def test_what_waits_for_time_segments_waits_for_their_end_since_spare_ones_are_cancelled() -> None:
    ids = {"distill-math": "7", "align": "5", "merge": "9"}
    segments = Cluster(stages={"distill": Placement(segments=2), "align": Placement(segments=3)})
    score = Job("eval", "eval", {}, ("fetch", "align", "distill-math", "merge"))
    told = ["--dependency=afterok:9,afterany:5:7", "--kill-on-invalid-dep=yes"]
    assert slurm.dependency(score, segments, ids) == told
    distill = Job("distill-math", "distill", {}, ("fetch", "align"))
    assert slurm.dependency(distill, segments, ids) == ["--dependency=afterany:5"]
    assert slurm.dependency(distill, replace(segments, kind="submitit"), ids)[0] == "--dependency=afterok:5"


def test_auto_finds_slurm_fetches_here_and_submits_the_rest_in_order(tmp_path: Path, calls: Path) -> None:
    assert main(["launch", "--name", "r"]) == 0
    run = tmp_path / "runs/r"
    jobs = f"{run}/jobs"
    assert (run / "jobs/fetch/manifest.json").exists()
    assert submissions(calls) == [
        f"sbatch --parsable {jobs}/tokenize/submit.sbatch",
        f"sbatch --parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {jobs}/cache/submit.sbatch",
        f"sbatch --parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {jobs}/align/submit.sbatch",
        f"sbatch --parsable --dependency=afterok:103:102 --kill-on-invalid-dep=yes {jobs}/distill-math/submit.sbatch",
        f"sbatch --parsable --dependency=afterok:103:102 --kill-on-invalid-dep=yes {jobs}/distill-code/submit.sbatch",
        f"sbatch --parsable --dependency=afterany:104:105 {jobs}/merge/submit.sbatch",
        "sbatch --parsable --dependency=afterok:101:103:104:105:106 --kill-on-invalid-dep=yes "
        f"{jobs}/eval/submit.sbatch",
        "sbatch --parsable --dependency=afterok:107:103:104:105:106 --kill-on-invalid-dep=yes "
        f"{jobs}/report/submit.sbatch",
    ]
    graph = read_graph(run)["jobs"]
    assert [graph[name].get("id") for name in ("fetch", "tokenize", "report")] == [None, "101", "108"]
    code = snapshot_folder(run)
    assert (code / "xlstm_distill/contract/job.py").is_file()
    assert f"PYTHONPATH={code}" in (run / "jobs/align/submit.sbatch").read_text()


def test_a_second_launch_skips_what_is_queued_and_submits_what_died(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["launch", "--name", "r", "stage=distill"]) == 0
    calls.write_text("")
    monkeypatch.setenv("QUEUED", "101 102 103 104")
    assert main(["launch", "--name", "r", "stage=distill"]) == 0
    (line,) = submissions(calls)
    assert "afterok:103:102" in line
    assert line.endswith("distill-code/submit.sbatch")


def others(calls: Path) -> list[str]:
    """Calls that change something, but for submissions."""
    return [line for line in calls.read_text().splitlines() if line.startswith(("scancel", "scontrol update"))]


@pytest.mark.slow
def test_a_failed_expert_is_submitted_anew_and_the_merge_that_waits_for_it_is_told(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["launch", "--name", "r", "stage=merge"]) == 0
    calls.write_text("")
    monkeypatch.setenv("QUEUED", "101 102 103 104 106")
    assert main(["launch", "--name", "r", "stage=merge"]) == 0
    (line,) = submissions(calls)
    assert line.endswith("distill-code/submit.sbatch")
    assert others(calls) == ["scontrol update JobId=106 Dependency=afterany:104:107"]


@pytest.mark.slow
def test_a_longer_budget_reaches_a_job_that_waits(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["launch", "--name", "r", "stage=align"]) == 0
    monkeypatch.setenv("QUEUED", "101 102")
    assert main(["launch", "--name", "r", "stage=align", "align.tokens=8192000"]) == 0
    assert "tokens: 8192000" in (tmp_path / "runs/r/jobs/align/config.yaml").read_text()
    assert len(submissions(calls)) == 2


def test_a_job_that_waits_with_older_code_keeps_the_settings_that_it_can_read(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--name", "r", "stage=align"]) == 0
    folder = tmp_path / "runs/r/jobs/align"
    before = (folder / "config.yaml").read_text()
    script = (folder / "submit.sbatch").read_text().replace(str(snapshot_folder(tmp_path / "runs/r")), "/older")
    (folder / "submit.sbatch").write_text(script)
    monkeypatch.setenv("QUEUED", "101 102")
    assert main(["launch", "--name", "r", "stage=align", "align.tokens=8192000"]) == 0
    assert (folder / "config.yaml").read_text() == before
    assert "tokens; launch again when it has ended, for 8192000" in capsys.readouterr().out


def test_a_restart_withdraws_a_job_from_the_queue_also_where_the_controller_is_slow(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["launch", "--name", "r", "stage=align", "cluster=slurm"]) == 0
    monkeypatch.setenv("QUEUED", "101 102")
    monkeypatch.setenv("PING", "DOWN")
    calls.write_text("")
    assert main(["launch", "--name", "r", "stage=align", "cluster=slurm", "--restart", "align"]) == 0
    assert others(calls) == ["scancel 102"]


def test_a_failed_element_is_told_while_its_siblings_are_in_the_queue(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--name", "r", "stage=tokenize"]) == 0
    listing = "printf '101_0|101|FAILED|\\n101_1|101|RUNNING|\\n'"
    (tmp_path / "stubs/squeue").write_text(f"#!/bin/bash\n[[ $* = *%o* ]] && exit\n{listing}\n")
    assert main(["launch", "--name", "r", "stage=tokenize"]) == 0
    said = capsys.readouterr().out
    assert "tokenize: in the queue as 101; 101_0 failed; launch again when the others have ended" in said


@pytest.mark.slow
def test_a_dry_run_shows_ids_that_are_known_and_what_a_restart_changes(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--name", "r", "stage=align"]) == 0
    monkeypatch.setenv("QUEUED", "101 102")
    later = ["launch", "--dry-run", "--name", "r", "stage=distill", "experts=[math]"]
    assert main(later) == 0
    said = capsys.readouterr().out
    assert "--- align: in the queue as 102" in said
    assert "--dependency=afterok:102:${cache}" in said
    changed = [*later, "student.window=32"]
    assert main(changed) == 2
    assert "  + student.window: 32" in capsys.readouterr().err
    assert main([*changed, "--restart", "align"]) == 0
    assert "--dependency=afterok:${align}:${cache}" in capsys.readouterr().out
    assert others(calls) == []


def test_a_container_sees_where_the_hub_keeps_the_teacher(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    output = tmp_path / "run/jobs/fetch/output"
    output.mkdir(parents=True)
    (output / "teacher").symlink_to(snapshot)
    config = compose(["cluster=slurm"], {}).config
    assert str(tmp_path / "hub/models--a--b") in slurm.mounts_of(config, tmp_path / "run")


@pytest.mark.slow
def test_another_setting_of_a_job_that_waits_is_refused_until_it_is_restarted(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--name", "r", "stage=align"]) == 0
    monkeypatch.setenv("QUEUED", "101 102")
    changed = ["launch", "--name", "r", "stage=align", "student.window=32"]
    assert main(changed) == 2
    assert "  + student.window: 32" in capsys.readouterr().err
    calls.write_text("")
    assert main([changed[0], "--restart", "align", *changed[1:]]) == 0
    assert others(calls) == ["scancel 102"]
    (line,) = submissions(calls)
    assert line.endswith("align/submit.sbatch")


@pytest.mark.slow
def test_another_placement_of_a_job_that_waits_is_told_and_replaced_on_request(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--name", "r", "stage=align"]) == 0
    monkeypatch.setenv("QUEUED", "101 102")
    calls.write_text("")
    assert main(["launch", "--time", "09:00:00", "--name", "r", "stage=align"]) == 0
    assert "align: in the queue as 102; it waits with the placement" in capsys.readouterr().out
    assert submissions(calls) == others(calls) == []
    assert main(["launch", "--cancel-obsolete", "--time", "09:00:00", "--name", "r", "stage=align"]) == 0
    assert others(calls) == ["scancel 102"]
    assert len(submissions(calls)) == 1


@pytest.mark.slow
def test_an_expert_that_is_no_longer_wanted_is_named_and_cancelled_on_request(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--name", "r", "stage=distill"]) == 0
    monkeypatch.setenv("QUEUED", "101 102 103 104 105")
    fewer = ["--name", "r", "stage=distill", "experts=[math]"]
    assert main(["launch", *fewer]) == 0
    assert "no longer wanted: distill-code; --cancel-obsolete" in capsys.readouterr().out
    calls.write_text("")
    assert main(["launch", "--cancel-obsolete", *fewer]) == 0
    assert others(calls) == ["scancel 105"]


def test_a_submission_whose_id_was_never_written_down_is_found_by_its_script(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUEUED", "7")
    monkeypatch.setenv("LOST", f"7|{tmp_path}/runs/r/jobs/tokenize/submit.sbatch\n8|/elsewhere/submit.sbatch\n")
    assert main(["launch", "--name", "r", "stage=tokenize"]) == 0
    assert submissions(calls) == []
    assert read_graph(tmp_path / "runs/r")["jobs"]["tokenize"]["id"] == "7"
    monkeypatch.setenv("QUEUED", "7 9")
    by_submitit = f"{tmp_path}/runs/r/jobs/align/submitit/submission_file_0f.sh"
    monkeypatch.setenv("LOST", f"9|{by_submitit}\n")
    assert main(["launch", "--name", "r", "stage=align"]) == 0
    assert submissions(calls) == []
    assert read_graph(tmp_path / "runs/r")["jobs"]["align"]["id"] == "9"


@pytest.mark.slow
def test_a_job_that_was_told_to_stop_is_waited_for_and_submitted_again(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--name", "r", "stage=tokenize"]) == 0
    (tmp_path / "runs/r/jobs/tokenize/stop").touch()
    looks = tmp_path / "looks"
    listing = f"echo >>{looks}; [ $(wc -l <{looks}) -gt 3 ] || echo '101|101|RUNNING|'"
    (tmp_path / "stubs/squeue").write_text(f"#!/bin/bash\n[[ $* = *%o* ]] && exit\n{listing}\n")
    calls.write_text("")
    assert main(["launch", "--name", "r", "stage=tokenize"]) == 0
    assert "tokenize: waiting until it has left the queue" in capsys.readouterr().out
    assert len(submissions(calls)) == 1
    assert not (tmp_path / "runs/r/jobs/tokenize/stop").exists()


def test_nothing_runs_here_beside_the_queue(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--name", "r", "stage=tokenize"]) == 0
    monkeypatch.setenv("QUEUED", "101")
    assert main(["launch", "--name", "r", "stage=tokenize", "cluster=local"]) == 2
    assert "tokenize are in Slurm's queue" in capsys.readouterr().err
    monkeypatch.setenv("QUEUED", "")
    assert main(["launch", "--name", "r", "stage=tokenize", "cluster=local"]) == 0


def test_nothing_of_a_surrounding_job_reaches_a_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SRUN_DEBUG", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    found = {name for name in clean_environment() if name.startswith(("SLURM", "SBATCH", "SRUN"))}
    assert found == {"SLURM_CONF"}


def test_the_signal_comes_as_early_as_a_stop_was_measured_to_need(tmp_path: Path) -> None:
    assert slurm.measured_signal(tmp_path) == 0
    (tmp_path / "stop.json").write_text('{"seconds": 301.2}')
    assert slurm.measured_signal(tmp_path) == 302
    (tmp_path / "stop.json").write_text('{"seconds": 3}')
    assert slurm.measured_signal(tmp_path) == 60
    (tmp_path / "stop.json").write_text('{"sec')
    assert slurm.measured_signal(tmp_path) == 0


def test_a_refusal_of_sbatch_is_one_line(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFUSE", "invalid partition specified: gpu")
    assert main(["launch", "--name", "r", "stage=tokenize"]) == 2
    assert "tokenize: sbatch refuses it: sbatch: error: invalid partition" in capsys.readouterr().err


def test_slurm_counts_only_where_its_controller_answers(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.answers()
    monkeypatch.setenv("PING", "DOWN")
    assert not slurm.answers()
    monkeypatch.setenv("PATH", "/nowhere")
    assert not slurm.answers()
