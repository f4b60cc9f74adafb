"""The Slurm backend among stubs of sbatch, squeue and scontrol."""

import os
import sys
from pathlib import Path

import pytest

from launcher.backends import local, slurm
from launcher.cli import main
from launcher.monitor import run_status
from launcher.runs import read_graph
from launcher.snapshot import snapshot_folder
from xlstm_distill.contract.job import Job

FAKE = Path(__file__).with_name("fake_stage.py")
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0")" in
    sbatch) [ -n "$REFUSE" ] && { echo "sbatch: error: $REFUSE" >&2; exit 1; }
            n=$(($(cat "$COUNT" 2>/dev/null || echo 100) + 1)); echo $n >"$COUNT"; echo "$n;cluster" ;;
    squeue) printf '%s\\n' $QUEUED ;;
    scontrol) echo "Slurmctld(primary) at here is ${PING:-UP}" ;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("sbatch", "squeue", "scontrol"):
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
    ids = {"distill-math": "7", "distill-code": "8", "align": "5"}
    merge = Job("merge", "merge", {}, ("distill-math", "distill-code"))
    assert slurm.dependency(merge, ids) == ["--dependency=afterany:7:8"]
    distill = Job("distill-math", "distill", {}, ("fetch", "align"))
    assert slurm.dependency(distill, ids) == ["--dependency=afterok:5", "--kill-on-invalid-dep=yes"]
    assert slurm.dependency(distill, {}) == []


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
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["launch", "--name", "r", "stage=distill"]) == 0
    calls.write_text("")
    monkeypatch.setenv("QUEUED", "101 102 103 104")
    assert {row.name: row.state for row in run_status(tmp_path / "runs/r")}["align"] == "queued"
    assert main(["launch", "--name", "r", "stage=distill"]) == 0
    (line,) = submissions(calls)
    assert "afterok:103:102" in line
    assert line.endswith("distill-code/submit.sbatch")


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
