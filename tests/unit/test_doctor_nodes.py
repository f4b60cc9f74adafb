"""`xdl doctor --nodes N`: slow, broken and differing nodes are named from the ranks' reports."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from launcher.compose import compose
from launcher.findings import compare
from launcher.nodes import check_nodes
from launcher.render import Site, render
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.schema import Cluster, Placement
from xlstm_distill.runtime.checkup import rounds

VERSIONS = {"python": "3.12.1", "torch": "2.13.0"}


def report(rank: int, **other: Any) -> dict[str, Any]:
    usual = {
        "rank": rank, "node": f"n{rank}", "finished": True, "versions": VERSIONS, "device": "H100", "product": "right",
        "flops": 600e12, "all_reduce": 100e9, "links": {f"n{rank - 1}": 40e9, f"n{rank + 1}": 40e9}, "skew": 0.001,
    }  # fmt: skip
    return {**usual, **other}


def test_equal_nodes_have_no_fault_and_their_figures_are_told() -> None:
    found = compare([report(rank) for rank in range(4)], 4)
    assert (found.fine, found.faults) == (True, {})
    assert found.lines == [
        "4 of 4 ranks reported",
        "versions    python 3.12.1, torch 2.13.0 on all; H100",
        "product     600 TFLOP/s per rank (median; slowest 600)",
        "links       40 GB/s between neighbours (median; slowest 40)",
        "all-reduce  100 GB/s over 4 ranks",
        "clocks      at most 0 ms apart",
    ]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"flops": 299e12}, "product 299 TFLOP/s per rank, the median is 600"),
        ({"links": {"n1": 5e9, "n3": 4e9}}, "links 5 GB/s between neighbours, the median is 40"),
        ({"product": "NaN or infinite"}, "rank 2: a product of matrices is NaN or infinite"),
        ({"versions": {**VERSIONS, "torch": "2.9.0"}}, "torch 2.9.0, elsewhere 2.13.0"),
        ({"versions": {"python": "3.12.1"}}, "torch missing, elsewhere 2.13.0"),
        ({"skew": -7.0}, "its clock is -7.0 s off"),
    ],
)
def test_the_node_that_stands_out_is_named(other: dict[str, Any], said: str) -> None:
    found = compare([report(rank, **(other if rank == 2 else {})) for rank in range(5)], 5)
    assert found.faults == {"n2": said}


def test_the_neighbour_of_a_slow_link_is_not_blamed_and_half_the_median_is_not_slow() -> None:
    links = {1: {"n0": 40e9, "n2": 4e9}, 2: {"n1": 4e9, "n3": 4e9}, 3: {"n2": 4e9, "n4": 40e9}}
    found = compare([report(rank, **({"links": links[rank]} if rank in links else {})) for rank in range(5)], 5)
    assert list(found.faults) == ["n2"]
    assert compare([report(0), report(1), report(2, flops=300e12)], 3).faults == {}


def test_who_is_silent_or_breaks_before_the_ranks_meet_is_blamed_not_those_who_waited() -> None:
    broken = {"rank": 1, "node": "n1", "finished": True, "error": "ImportError: libcuda"}
    waiting = [{**report(rank), "error": "DistStoreError: timed out"} for rank in (0, 2)]
    found = compare([waiting[0], broken, waiting[1]], 4, ["n0", "n1", "n2", "n3"])
    assert not found.fine
    assert found.faults == {"n1": "rank 1: ImportError: libcuda", "n3": "no report from rank 3"}
    nameless = compare([], 1)
    assert (nameless.faults, nameless.lines) == ({"rank 0": "no report from rank 0"}, ["0 of 1 ranks reported"])


@pytest.mark.parametrize("count", range(1, 9))
def test_every_pair_of_neighbours_is_measured_once_and_no_node_twice_at_a_time(count: int) -> None:
    firsts = [4 * node for node in range(count)]
    played = list(rounds(firsts))
    for pairs in played:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)
    pairs = sorted(tuple(sorted(pair)) for pairs in played for pair in pairs)
    expected = {tuple(sorted((firsts[at], firsts[(at + 1) % count]))) for at in range(count) if count > 1}
    assert pairs == sorted(expected)


def test_the_offer_is_understood_as_it_is_printed() -> None:
    config = compose(["cluster=slurm", "cluster.sbatch.exclude=node3,node5"]).config
    assert config.cluster.sbatch == {"exclude": "node3,node5"}
    with pytest.raises(Mistake, match="write a list as"):
        compose(["eval.tasks=a,b"])


def test_the_script_is_bash_has_the_sites_settings_and_quotes_them(tmp_path: Path) -> None:
    job = Job("check", "check", {}, placement=Placement(nodes=4, gpus_per_node=2, time="00:10:00", memory="8G"))
    cluster = Cluster(sbatch={"account": "$(touch x)", "exclusive": ""}, gpu_flag="gres", setup=("module load cuda",))
    site = Site("doctor", tmp_path / "a b", "/opt/my python", tmp_path / "code")
    text = render(job, cluster, site, template="check.sbatch.j2")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    for line in (
        "--nodes=4",
        "--ntasks-per-node=2",
        "--gres=gpu:2",
        "--account='$(touch x)'",
        "--exclusive",
        "--mem=8G",
    ):
        assert f"#SBATCH {line}\n" in text
    assert f"JOB='{tmp_path}/a b/jobs/check'" in text
    assert "'/opt/my python' -m xlstm_distill checkup" in text


@pytest.fixture
def fake_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ranks that write the report in tmp_path/RANK and end, in place of real ones."""
    stand_in = tmp_path / "rank"
    stand_in.write_text(
        "#!/bin/bash\nmkdir -p \"$4/reports\"\ncp \"$(dirname \"$0\")/$RANK.json\" \"$4/reports/rank-$RANK.json\"\n"
    )  # fmt: skip
    stand_in.chmod(0o755)
    monkeypatch.setattr("launcher.nodes.sys.executable", str(stand_in))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_on_this_machine_the_ranks_are_compared_and_a_clean_check_leaves_nothing(
    fake_ranks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        (fake_ranks / f"{rank}.json").write_text(json.dumps(report(rank)))
    assert main(["doctor", "--nodes", "1", "--gpus-per-node", "2", "cluster=local"]) == 0
    assert "2 of 2 ranks reported" in capsys.readouterr().out
    assert list((fake_ranks / "runs/.doctor").iterdir()) == []
    (fake_ranks / "1.json").unlink()
    assert main(["doctor", "--nodes", "1", "--gpus-per-node", "2", "cluster=local"]) == 1
    text = capsys.readouterr().out
    assert "rank 1: no report from rank 1" in text
    assert "the check ended early (exit codes 0, 1)" in text
    assert "cluster.sbatch.exclude" not in text


def test_more_nodes_than_this_machine_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nodes", "2", "cluster=local"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


SBATCH = """#!/bin/bash
JOB=$(sed -n 's/^JOB=//p' "${@: -1}"); mkdir -p "$JOB/reports"
printf 'n0\\nn1\\nn2\\nn3\\n' >"$JOB/nodes"
for rank in 0 1 2; do cp "$REPORTS/$rank.json" "$JOB/reports/rank-$rank.json"; done
echo "77;cluster"
"""


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stubs = {
        "sbatch": SBATCH,
        "scontrol": "#!/bin/bash\necho 'Slurmctld(primary) at here is UP'\n",
        "squeue": '#!/bin/bash\necho "77|77|${STATE:-COMPLETED}|None"\n',
        "scancel": f"#!/bin/bash\necho $* >>{tmp_path}/cancelled\n",
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for rank in range(3):
        (tmp_path / f"{rank}.json").write_text(json.dumps(report(rank, **({"flops": 1e12} if rank == 1 else {}))))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("REPORTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_on_slurm_slow_and_silent_nodes_are_offered_for_exclude(
    fake_slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--nodes", "4", "cluster=slurm", "cluster.sbatch.exclude=n9"]) == 1
    text = capsys.readouterr().out
    assert "n1: product 1 TFLOP/s per rank, the median is 600" in text
    assert "n3: no report from rank 3" in text
    assert "cluster.sbatch.exclude=n9,n3,n1\n" in text


def test_ctrl_c_cancels_the_check(fake_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", "PENDING")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.nodes.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_nodes(4, None, ["cluster=slurm"], "runs")
    assert (fake_slurm / "cancelled").read_text() == "77\n"


@pytest.mark.slow
@pytest.mark.dist
def test_real_ranks_find_each_other_and_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--nodes", "1", "--gpus-per-node", "3", "--runs", str(tmp_path), "cluster=local"])
    lines = capsys.readouterr().out.splitlines()
    assert "3 of 3 ranks reported" in lines
    assert [line.split()[0] for line in lines[2:5]] == ["versions", "product", "all-reduce"]
