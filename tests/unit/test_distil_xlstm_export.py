"""A Distil-xLSTM is exported as the other student is; its code asks for the package xlstm besides, and says so."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distil_support import PAPER, tiny_distil
from eval_support import job, tiny_tokenizer
from export_support import TEACHER_FACTS, clean_environment, config, run_python
from transformers import AutoModelForCausalLM

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.export import code_files, export

ROOT = Path(__file__).parents[2]
TOKENS = torch.tensor([[5, 9, 200, 41, 17, 33, 8, 120]])
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
assert "xlstm_distill" not in sys.modules
tokens = torch.tensor([[5, 9, 200, 41, 17, 33, 8, 120]])
torch.save((model(tokens).logits, model.generate(tokens, max_new_tokens=5, do_sample=False)), sys.argv[2])
"""


@pytest.fixture
def finished(tmp_path):
    """(run, student) with one expert distilled."""
    settings = config()
    student = replace(settings.student, kind="distil_xlstm")
    settings = replace(settings, student=student, distill=replace(settings.distill, **PAPER), experts=("math",))
    made = tiny_distil(tmp_path / "made", vocab_size=258)
    made.save_pretrained(tmp_path / "saved")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "saved")
    run = tmp_path / "run"
    (run / "jobs").mkdir(parents=True)
    (run / "graph.json").write_text("{}")
    facts = {"fetch": {"teacher": TEACHER_FACTS}, "distill-math": {"tokens": 2048, "steps": 10}}
    inputs = {"fetch": (), "tokenize": ("fetch",), "align": ("fetch",), "distill-math": ("fetch", "align", "tokenize")}
    for name, own in inputs.items():
        folder = job(run, settings, name, name.partition("-")[0], own)
        if name in ("align", "distill-math"):
            shutil.copytree(tmp_path / "saved", folder.output / "student")
        folder.finish(facts.get(name, {}))
    return run, made


def test_the_code_is_its_own_and_the_card_speaks_of_it(finished, tmp_path):
    run, student = finished
    target = tmp_path / "out"
    export(run, target)
    settings = json.loads((target / "config.json").read_text())
    assert settings["auto_map"] == {
        "AutoConfig": "distil_xlstm.DistilXLSTMConfig",
        "AutoModelForCausalLM": "distil_xlstm.DistilXLSTMForCausalLM",
    }
    files = {file.stem for file in code_files("distil_xlstm")}
    assert files == {file.stem for file in target.glob("*.py")}
    assert {"distil_blocks", "xlstm_package", "student", "cache"} <= files
    assert not {"mixer", "modeling", "mlstm"} & files
    card = (target / "README.md").read_text()
    assert "# tiny as a Distil-xLSTM" in card
    assert "4 xLSTM blocks, sLSTM and mLSTM by turns, stand in the place of its 8 layers" in card
    assert "pip install --no-deps xlstm" in card
    assert f"{student.config.state_bytes() / 1e6:,.2f} MB" in card
    assert "window" not in card.partition("## Training")[0]
    assert "`distill.beta_end`" not in card or "0.5" in card
    again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assert again(TOKENS).logits.equal(student(TOKENS).logits)


def test_its_untrained_start_is_no_model_to_export(finished, tmp_path):
    run, _ = finished
    with pytest.raises(Mistake, match="--model aligned: is no student that this run makes"):
        export(run, tmp_path / "out", "aligned")


@pytest.mark.slow
def test_with_torch_transformers_and_xlstm_alone_it_computes_the_same(finished, tmp_path):
    run, student = finished
    export(run, tmp_path / "out")
    python = clean_environment(tmp_path / "venv")
    failed = subprocess.run(
        [python, "-c", LOAD, str(tmp_path / "out"), "x"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "a Distil-xLSTM needs the package xlstm: pip install --no-deps xlstm" in failed.stderr
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    import xlstm

    (site / "xlstm").symlink_to(Path(xlstm.__file__).parent)
    run_python(python, LOAD, tmp_path, tmp_path / "out", tmp_path / "found.pt")
    logits, written = torch.load(tmp_path / "found.pt")
    assert torch.allclose(logits, student(TOKENS).logits, atol=1e-5)
    assert written.equal(student.generate(TOKENS, max_new_tokens=5, do_sample=False))


@pytest.mark.slow
def test_a_gpu_without_a_toolkit_is_no_hindrance():
    """There `import xlstm` ends in an OSError: it asks torch for CUDA's headers."""
    start = "import torch\ntorch.cuda.is_available = lambda: True\n"
    for code, fails in (("import xlstm", True), ("import xlstm_distill.model.distil_blocks", False)):
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HOME": "/nonexistent"}
        done = subprocess.run(
            [sys.executable, "-c", start + code], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode != 0) is fails, done.stderr
        assert not fails or "CUDA_HOME" in done.stderr
