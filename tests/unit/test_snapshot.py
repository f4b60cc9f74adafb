"""What a launch leaves on record: the code as it was, the commit, its changes, the packages; no secret."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import snapshot
from xlstm_distill.contract.files import read_lines

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz",
    "WANDB_API_KEY": "0123456789",
    "AWS_SECRET_ACCESS_KEY": "x",
    "MY_PASSWORD": "correct horse",
    "DB_PASS": "p",
    "SESSION_COOKIE": "c",
    "http_proxy": "http://user:secret@proxy:3128",
    "HARMLESS": "Bearer ghp_0123456789abcdefghij",
    "GH_PAT": "abc",
    "BASH_FUNC_get%%": "() { curl -H 'Authorization: Bearer 0123456789ab' x; }",
    "WANDB": "0123456789abcdef0123456789abcdef01234567",
    "ODD": "q8ZrT5vLm2Xw9KpB7nYc4DfGh6JsAe3U",
}
PUBLIC = {
    "PATH": "/usr/bin:/opt/Some9Long0Path1With2Digits3/bin",
    "PWD": "/home/me",
    "SLURM_CONF": "/etc/slurm.conf",
    "KEYBOARD": "de",
    "AUTHOR": "me",
    "PATTERN": "*.py",
    "LANG": "C.UTF-8",
    "TOKENIZERS": "4",
}


def test_secrets_are_hidden_by_name_and_by_shape_and_the_rest_stays() -> None:
    shown = snapshot.scrubbed({**SECRETS, **PUBLIC})
    assert list(shown) == sorted({**SECRETS, **PUBLIC})
    text = json.dumps(shown)
    for name, value in SECRETS.items():
        assert value not in shown[name], name
        assert "0123456789ab" not in shown[name], name
        assert snapshot.HIDDEN in shown[name], name
    assert "secret" not in text
    assert "ghp_" not in text
    for name in ("PATH", "PWD", "SLURM_CONF", "KEYBOARD", "AUTHOR", "LANG", "PATTERN"):
        assert shown[name] == PUBLIC[name]


def test_a_private_key_is_hidden_in_a_text() -> None:
    text = "a\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\nxyz\n-----END RSA PRIVATE KEY-----\nb"
    assert snapshot.scrubbed_text(text) == f"a\n{snapshot.HIDDEN}\nb"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a commit, a changed file and a new one."""
    root = tmp_path / "checkout"
    for name in ("xlstm_distill", "launcher"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (root / "xlstm_distill/__init__.py").write_text("changed = 1\n")
    (root / "launcher/new.py").write_text("token = 'hf_abcdefghijklmnopqrstuvwxyz'\n")
    monkeypatch.setattr(snapshot, "package_folder", lambda: root / "xlstm_distill")
    monkeypatch.setattr(snapshot, "__file__", str(root / "launcher/snapshot.py"))
    return root


def test_a_snapshot_holds_the_code_of_the_moment_and_its_difference_from_the_commit(
    checkout: Path, tmp_path: Path
) -> None:
    folder = snapshot.take_snapshot(tmp_path / "run")
    (checkout / "xlstm_distill/__init__.py").write_text("changed = 2\n")
    assert (folder / "xlstm_distill/__init__.py").read_text() == "changed = 1\n"
    assert (folder / "launcher/new.py").exists()
    changes = (folder / "changes.diff").read_text()
    assert "+changed = 1" in changes
    assert "+token = '" in changes
    assert "hf_abc" not in changes
    assert snapshot.take_snapshot(tmp_path / "run") != folder


def test_a_job_of_a_snapshot_knows_its_commit(tmp_path: Path) -> None:
    folder = snapshot.take_snapshot(tmp_path)
    code = "from xlstm_distill.contract.job import code_version; print(code_version())"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True, env={"PATH": ""}
    ).stdout
    assert told.strip() == str(json.loads((folder / "commit.json").read_text()))


def test_every_launch_is_recorded_with_packages_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    code = snapshot.take_snapshot(tmp_path)
    secret = "https://me:hunter2@host/x 'cluster.setup=[export WANDB_API_KEY=0123abc]' align.tokens=8192"
    snapshot.record_launch(tmp_path, f"xdl launch data.path={secret}", code)
    snapshot.record_launch(tmp_path, "xdl launch")
    first, second = read_lines(tmp_path / "launches.jsonl")
    assert first["code"] == snapshot.snapshot_folder(tmp_path).name
    assert "code" not in second
    assert first["packages"]["numpy"].count(".") >= 2
    assert first["environment"]["HF_TOKEN"] == snapshot.HIDDEN
    assert "hunter2" not in first["command"]
    assert "0123abc" not in first["command"]
    assert "align.tokens=8192" in first["command"]
