"""The `xdl` command as a user types it: fast, one line for a mistake, and no torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in (
        "launch",
        "status",
        "logs",
        "cancel",
        "stop",
        "tensorboard",
        "config",
        "report",
        "generate",
        "export",
        "doctor",
    ):
        assert f"  {command} " in text


def test_help_costs_little_above_python() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from startup import above_python
    finally:
        sys.path.pop(0)
    bare, above = above_python(3)
    assert above < max(0.15, 8 * bare)


def test_a_dry_run_for_eight_nodes_prints_graph_and_scripts_without_slurm_or_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from launcher.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or (9 if 'torch' in sys.modules else 0))"
    )
    command = [sys.executable, "-c", code, "launch", "--nodes", "8", "stage=distill", "--dry-run", "distill.batch=4"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0
    assert re.search(r"├─ distill-math +new +8 × 1 .* after cache too\n", done.stdout)
    assert done.stdout.count("#SBATCH --nodes=8") == 3
    assert "--dependency=afterok:${align}:${cache} --kill-on-invalid-dep=yes" in done.stdout
    assert "merge" not in done.stdout
    assert "warning: distill.batch=4: 8 ranks need a sample each; expected 8 or more" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_on_this_machine_prints_the_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--dry-run", "--name", "x y"]) == 0
    text = capsys.readouterr().out
    assert "-m xlstm_distill" in text
    assert "/runs/x y/jobs/align'" in text
    assert "#SBATCH" not in text
    assert main(["launch", "--dry-run", "cluster=slurm"]) == 0
    assert "--dependency=afterany:${distill-math}:${distill-code} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launch", "--nodes", "8"], "--nodes 8: no Slurm answers here"),
        (["launch", "--node", "8"], "No such option"),
        (["launch", "--nodes", "many"], "Invalid value for '--nodes'"),
        (["launch", "--nodes", "0"], "cluster.stages.align.nodes=0"),
        (["launch", "--name", "a/b"], "name='a/b'"),
        (["launch", "--name", "a\nb"], "name='a\\nb'"),
        (["launch", "algin.lr=3"], "the nearest is align.lr"),
        (["launch", "--gpus-per-node", "3", "align.batch=2"], "align.batch=2: 3 ranks need a sample each"),
        (["launch", "stage=align", "student.init_from=x"], "student.init_from"),
        (["config", "cache.top_k=1e9"], "49152"),
        (["config", "stage=nowhere"], "stage=nowhere"),
        (["status"], "no runs"),
        (["status", "nobody"], "no such run"),
        (["logs", "nobody"], "no such run"),
        (["report", "nobody"], "no such run"),
        (["lunch"], "No such command"),
        (["logs"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_placement_flags_apply_to_training_or_to_the_stage_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--dry-run", "--time", "01:00:00", "cluster=slurm", "stage=eval"]) == 0
    text = capsys.readouterr().out
    assert text.count("--time=01:00:00") == 1
    assert main(["launch", "--dry-run", "--time", "01:00:00", "cluster=slurm", "--only", "stage=distill"]) == 0
    assert capsys.readouterr().out.count("--time=01:00:00") == 2


def test_config_prints_values_and_origins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "align.lr=2e-3", "teacher=llama-3.1-8b"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "lr: 0.002 # command line" in lines
    assert "vocab_size: 128256 # configs/teacher/llama-3.1-8b.yaml" in lines
    assert "tokens: 655360000 # configs/recipe/llama-base.yaml" in lines


def test_doctor_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) in (0, 1)
    text = capsys.readouterr().out
    assert "Slurm                none (no sbatch)" in text
    assert "mosaicml-streaming" in text


def test_report_of_any_scores_is_passed_on_with_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = {"teacher": {"a": 1.0, "b": 0.5}, "students": {"s": {"a": 1.0, "b": 0.4}}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert main(["report", "--scores", "scores.json", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["s"]["critical_tolerance"] == 0.0
    assert main(["report", "--scores", "nowhere.json"]) == 2
    assert "nowhere.json" in capfd.readouterr().err
