"""The wheel is whole: installed elsewhere, `xdl` plans and renders from any folder."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from launcher.doctor import STREAMING_NEEDS
from xlstm_distill.contract.data import data_folder

ROOT = Path(__file__).parents[2]


def test_a_checkout_finds_its_data() -> None:
    assert data_folder("configs") == ROOT / "configs"
    assert (data_folder("slurm") / "job.sbatch.j2").is_file()


def test_the_metadata_leaves_out_what_contradicts_the_rest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for group in project["optional-dependencies"].values() for need in group]
    declared = " ".join([*project["dependencies"], *extras])
    assert "mosaicml-streaming" not in declared
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"
    assert len(STREAMING_NEEDS) == 5


def test_continuous_integration_runs_checks_and_tests() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert "set -euo pipefail" in script
    assert "make check test" in script
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.slow
def test_the_wheel_installed_elsewhere_works_from_any_folder(tmp_path: Path) -> None:
    source, wheels, site, elsewhere = (tmp_path / name for name in ("source", "wheels", "site", "elsewhere"))
    elsewhere.mkdir()
    ignore = shutil.ignore_patterns(".*", "runs", "tests", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        roots = {name.split("/")[0] for name in archive.namelist()}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"launcher", "xlstm_distill"}
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    shutil.rmtree(source)
    environment = {"PYTHONPATH": str(site), "PATH": str(elsewhere)}
    command = [sys.executable, str(site / "bin/xdl"), "launch", "--nodes", "8", "stage=distill", "--dry-run"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#SBATCH --nodes=8") == 3
    where = "from xlstm_distill.contract.data import data_folder; print(data_folder('configs'))"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(site / "xlstm_distill/_data/configs")
