"""The submitit backend: what it hands to sbatch. It runs for real in tests/slurm."""

import pickle
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from submitit import AutoExecutor
from test_render import FULL, PIECES, SEGMENTS, SITE

from launcher.backends import submitit
from launcher.compose import compose
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import Job, JobFolder
from xlstm_distill.contract.schema import Cluster


def folder_of(job: Job, cluster: Cluster) -> JobFolder:
    config = replace(compose(["cluster=submitit"]).config, cluster=replace(cluster, kind="submitit"))
    return JobFolder(SITE.folder / "jobs" / job.name, job, config)


def test_the_script_asks_for_the_same_place_as_sbatch_and_for_no_wckey() -> None:
    text = submitit.Submitit().script(folder_of(SEGMENTS, FULL), SITE, {"align": "7"})
    for option in (
        "nodes=8", "ntasks-per-node=4", "cpus-per-task=8", "gres=gpu:4", "mem=64G", "time=1440", "signal=USR2@120",
        "account=me", "qos=long", "partition=big", "exclude='node[3,5]'", "dependency=afterok:7",
        "kill-on-invalid-dep=yes", "job-name=demo.distill-math",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in text, option
    for bare in ("exclusive", "requeue"):
        assert f"#SBATCH --{bare}\n" in text
    assert "wckey" not in text
    assert "module load cuda\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_pieces_become_an_array_and_a_wckey_is_given_when_asked_for() -> None:
    text = submitit.Submitit().script(folder_of(PIECES, Cluster(sbatch={"wckey": "mine"})), SITE, {})
    assert "#SBATCH --array=0-2%3\n" in text
    assert "#SBATCH --wckey=mine\n" in text
    assert "#SBATCH --gpus-per-node=1\n" in text


@pytest.mark.parametrize("cluster", [FULL, Cluster(), Cluster(gpu_flag="none")])
def test_submitit_takes_the_parameters_of_every_way_to_ask_for_gpus(cluster: Cluster, tmp_path: Path) -> None:
    """AutoExecutor checks types, which the script of a dry run does not."""
    executor = AutoExecutor(folder=tmp_path, cluster="debug")
    executor.update_parameters(**submitit.parameters(folder_of(PIECES, cluster), SITE, {}))


def test_a_container_is_refused() -> None:
    with pytest.raises(Mistake, match=r"cluster\.container=pyxis"):
        submitit.Submitit().script(folder_of(PIECES, Cluster(container="pyxis", image="i")), SITE, {})


def test_what_is_pickled_is_the_folder_and_its_checkpoint_is_the_same_call(tmp_path: Path) -> None:
    stage = pickle.loads(pickle.dumps(submitit.Stage(str(tmp_path), 3)))
    assert vars(stage) == {"folder": str(tmp_path), "elements": 3}
    again = stage.checkpoint(2)
    assert (again.function, again.args) == (stage, (2,))
