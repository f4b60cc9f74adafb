"""`xdl doctor` says what Slurm and the disk have, and proposes a configuration for the cluster."""

import os
from pathlib import Path

import pytest

from launcher import doctor
from launcher.cli import main
from launcher.compose import compose
from launcher.site import Partition, parse_config, parse_partitions, propose

CONFIG = """Configuration data as of 2026-01-01T00:00:00
AccountingStorageType   = {storage}
ClusterName             = jean
GresTypes               = gpu
MinJobAge               = 300 sec
SelectType              = {select}
SLURM_VERSION           = {version}
"""
SINFO = """cpu*|up|1-00:00:00|90|40|(null)
big|up|10:00:00|2|96|gpu:h100:4(S:0-1),nvme:1
big|up|10:00:00|30|64|gpu:a100:8(S:0-1)
off|down|infinite|99|1|gpu:16
debug|up|infinite|1|4+|
"""
STUB = """#!/bin/bash
case "$(basename "$0") $*" in
    "scontrol show config") printf '%s' "$CONFIG" ;;
    sinfo*) printf '%s' "$SINFO" ;;
    sacctmgr*) printf '%s' "$ACCOUNTS"; [ -n "$ACCOUNTS" ] ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stubs of Slurm's commands in a PATH with nothing else but the shell's."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacctmgr"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    for name in ("bash", "basename"):
        (stubs / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(stubs))
    monkeypatch.setenv(
        "CONFIG", CONFIG.format(storage="accounting_storage/none", select="select/cons_tres", version="23.11.4")
    )
    monkeypatch.setenv("SINFO", SINFO)
    for name in ("ACCOUNTS", "XDL_CONFIG_DIR", "SLURM_ACCOUNT", "SBATCH_ACCOUNT", "SALLOC_ACCOUNT", "LOADEDMODULES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return stubs


def test_partitions_have_their_most_frequent_nodes_and_their_gpus() -> None:
    assert parse_partitions(SINFO) == [
        Partition("cpu", True, "1-00:00:00", 90, 40, 0),
        Partition("big", False, "10:00:00", 30, 64, 8, "a100"),
        Partition("debug", False, "infinite", 1, 4, 0),
    ]


def test_the_diagnosis_names_version_partitions_and_what_slurm_lacks(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) in (0, 1)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Slurm 23.11.4 cluster jean" in lines
    assert "partition cpu 90 nodes of 40 CPUs and 0 GPUs, limit 1-00:00:00, the default" in lines
    assert "accounting none how a job ended is known for 300 sec (MinJobAge) and from the run folder" in lines
    assert not any("missing xdl" in line for line in lines)
    (cluster / "scancel").unlink()
    (cluster / "scontrol").unlink()
    assert list(doctor.slurm_lines()) == [("Slurm", "sbatch is here, but scontrol show config does not answer")]


def test_missing_commands_are_named_with_what_their_lack_means(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cluster / "scancel").unlink()
    monkeypatch.setenv("CONFIG", CONFIG.format(storage="accounting_storage/slurmdbd", select="x", version="20.02.1"))
    lacks = {name.strip(): state for name, state, *_ in doctor.slurm_lines()}
    assert lacks["scancel"] == lacks["sacct"] == "missing"
    assert "accounting" not in lacks


def test_the_disk_of_the_runs_folder_is_measured_also_before_it_exists(tmp_path: Path) -> None:
    lines = {name.strip(): state for name, state, *_ in doctor.disk_lines(tmp_path / "not/yet")}
    assert lines["runs folder"] == str(tmp_path)
    free = os.statvfs(tmp_path)
    assert float(lines["free"].split()[0]) == pytest.approx(free.f_bavail * free.f_frsize / 1e9, rel=0.05, abs=0.2)
    assert float(lines["write speed"].split()[0]) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "write_speed", refuse)
    assert ("  write speed", "none", "cannot write there: Permission denied") in list(doctor.disk_lines(tmp_path))


def test_a_proposed_site_is_loaded_by_its_name(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDL_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("LOADEDMODULES", "cuda/12.4:gcc/13: odd 'name'#")
    monkeypatch.setenv("SBATCH_ACCOUNT", "proj: #1")
    assert main(["doctor", "--write-site", "jean"]) == 0
    config = compose(["cluster=jean", "teacher=llama-3.1-8b-instruct"]).config.cluster
    assert config.kind == "slurm"
    assert config.sbatch == {"partition": "cpu", "account": "proj: #1"}
    assert config.gpu_flag == "gpus-per-node"
    assert config.gpu == "a100"
    assert config.setup == ("module load cuda/12.4 gcc/13 ' odd '\"'\"'name'\"'\"'#'",)
    train = config.stages["distill"]
    assert (train.partition, train.cpus_per_task, train.time, train.gpus_per_node) == ("big", 8, "10:00:00", 8)
    assert train.segments == 3, "the recipe's settings stay where Slurm says nothing about them"
    assert (config.stages["eval"].partition, config.stages["tokenize"].time) == ("big", "12:00:00")
    text = capsys.readouterr().out
    settings = [line for line in text.partition("\n\n")[0].splitlines() if not line.endswith(":")]
    assert all("#" in line for line in settings)
    assert main(["doctor", "--write-site", "jean"]) == 2
    assert "jean.yaml: exists" in capsys.readouterr().err


def test_without_a_folder_of_ones_own_nothing_is_written(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.rglob("*"))
    assert main(["doctor", "--write-site", "jean"]) == 0
    assert "not written: set XDL_CONFIG_DIR" in capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("name", "said"), [("slurm", "has a cluster of that name"), ("a/b", "not fit for a folder")])
def test_a_site_needs_a_name_of_its_own(
    cluster: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--write-site", name]) == 2
    assert said in capsys.readouterr().err


def test_without_slurm_there_is_no_site_to_propose(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "scontrol").unlink()
    assert main(["doctor", "--write-site", "jean"]) == 2
    assert "scontrol show config does not answer here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "select", "flag"),
    [
        ("23.11.4", "select/cons_tres", "gpus-per-node"),
        ("22.05.8", "select/linear", "gres"),
        ("18.08.1", "select/cons_res", "gres"),
    ],
)
def test_gpus_are_asked_for_as_version_and_selector_can(version: str, select: str, flag: str) -> None:
    config = parse_config(CONFIG.format(storage="x", select=select, version=version))
    text = propose("x", config, parse_partitions("p*|up|infinite|2|16|gpu:4\n"), {}, ["first", "second"])
    assert f"\ngpu_flag: {flag}  # SLURM_VERSION={version}, SelectType={select}" in text
    assert "account: first  # sacctmgr show assoc; others are second" in text
    assert "time:" not in text


def test_a_cluster_without_gpus_or_partitions_is_proposed_too() -> None:
    text = propose("x", {}, [], {})
    assert "no GPUs (sinfo)" in text
    assert "stages:" not in text
