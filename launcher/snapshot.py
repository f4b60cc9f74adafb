"""What a launch leaves on record: a copy of the packages that its jobs run, the commit and changes that it was made
from, the packages and the environment of the moment.

runs/NAME/  code/HASH/{xlstm_distill/, launcher/, commit.json, changes.diff}  launches.jsonl

On a cluster jobs start hours later, when the checkout may have changed.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from xlstm_distill.contract.files import append_line, hash_file, hash_value, sync
from xlstm_distill.contract.job import code_version

RECORDED = ("launcher", "xlstm_distill", "configs", "slurm", "pyproject.toml")
"""Whose changes since the commit are recorded."""
HIDDEN = "(hidden)"
SECRET_NAMES = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|PRIVATE|SIGNATURE|(^|_)(KEY|PWD|PASS|PAT|AUTH|SAS|DSN)(S|$|_)|API_?KEY"
    r"|ACCESS_?KEY|(?<!O)AUTH(ORIZATION)?(_|$)",
    re.IGNORECASE,
)
"""Names of environment variables whose values are not for others."""
PUBLIC_NAMES = frozenset({"PWD", "OLDPWD", "SSH_AUTH_SOCK", "XAUTHORITY"})
SECRET_SHAPES = re.compile(
    r"\b(?:hf_|gh[oprsu]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|ASIA|AIza|eyJ[\w-]+\.eyJ)[\w.-]{10,}"
    r"|(?<=Bearer )\S{8,}"
    r"|(?<=://)[^\s/@]+:[^\s/@]+(?=@)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
"""Tokens of well-known services, user and password in an address, private keys."""
ASSIGNED = re.compile(r"\b([A-Z][A-Z0-9_]{2,})=((?:\"[^\"]*\"|'[^']*'|[^\s'\"\]])+)")
"""A variable of the environment and its value, in a command."""
RANDOM_WORD = re.compile(
    r"(?=[\w+/=-]*[a-z])(?=[\w+/=-]*[A-Z])(?=[\w+/=-]*\d)[\w+=-]{32,}|(?<!\w)(?=[0-9a-f]*[a-f])(?=[a-f]*\d)[0-9a-f]{32,}(?!\w)"
)
"""A word that nobody chose: long, of small and capital letters and digits, or hexadecimal."""


def package_folder() -> Path:
    """Folder of the `xlstm_distill` package in use."""
    return Path(sys.modules["xlstm_distill"].__path__[0])


def _files() -> dict[str, Path]:
    """Files of both packages: submitit's jobs start with the launcher's `Stage`."""
    found: dict[str, Path] = {}
    for package in (package_folder(), Path(__file__).parent):
        files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        found |= {f"{package.name}/{path.relative_to(package).as_posix()}": path for path in sorted(files)}
    return found


def snapshot_folder(run: Path) -> Path:
    """`code/HASH` of a run for the code as it is now, uncommitted changes included; it need not exist yet."""
    return run / "code" / hash_value({name: hash_file(path) for name, path in _files().items()})


def take_snapshot(run: Path) -> Path:
    """Copy the packages to `code/HASH`, if they are not there yet, with the commit and what differs from it; returns
    that folder. The hash is of what was copied: somebody may be editing."""
    beside = run / "code" / f".new-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    digests = {}
    for name, path in _files().items():
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, beside / name)
        digests[name] = hash_file(beside / name)
    folder = run / "code" / hash_value(digests)
    if folder.exists():
        shutil.rmtree(beside)
        return folder
    (beside / "commit.json").write_text(json.dumps(code_version()) + "\n", encoding="utf-8")
    (beside / "changes.diff").write_text(scrubbed_text(_changes()), encoding="utf-8")
    for path in sorted(beside.rglob("*")):
        sync(path)
    beside.replace(folder)
    sync(folder.parent)
    return folder


def _changes() -> str:
    """What the packages and their settings have beyond the commit, new files included; empty outside of a checkout."""
    root = package_folder().parent
    if not ((root / ".git").exists() and shutil.which("git")):
        return ""
    git = ["git", "-C", str(root)]
    listing = [*git, "ls-files", "-z", "--others", "--exclude-standard", "--", *RECORDED]
    new = subprocess.run(listing, capture_output=True, check=False).stdout
    parts = [subprocess.run([*git, "diff", "HEAD", "--", *RECORDED], capture_output=True, check=False).stdout]
    for name in filter(None, new.split(b"\0")):
        compare = [*git, "diff", "--no-index", "--", "/dev/null", os.fsdecode(name)]
        parts.append(subprocess.run(compare, capture_output=True, check=False).stdout)
    return b"".join(parts).decode(errors="replace")


def record_launch(run: Path, command: str, code: Path | None = None) -> None:
    """Add a line to `launches.jsonl`: when, where, what was typed, the snapshot `code` (a launch on this machine has
    none), packages and environment, without secrets."""
    append_line(
        run / "launches.jsonl",
        {
            "time": round(time.time(), 3),
            "host": platform.node(),
            "command": scrubbed_text(command),
            **({"code": code.name} if code else {}),
            **code_version(),
            "python": platform.python_version(),
            "packages": installed(),
            "environment": scrubbed(os.environ),
        },
    )


def installed() -> dict[str, str]:
    """Version of every installed package, by the names of their folders: reading their metadata takes seconds."""
    folders = (path for place in sys.path for path in sorted(Path(place or ".").glob("*.dist-info")))
    found = [path.name.removesuffix(".dist-info").partition("-") for path in folders]
    return {name: version for name, _, version in reversed(found)}  # of two, Python takes the first


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with every value hidden that is a secret by its name or its shape."""
    return {
        name: HIDDEN
        if (SECRET_NAMES.search(name) and name not in PUBLIC_NAMES) or RANDOM_WORD.search(value)
        else scrubbed_text(value)
        for name, value in sorted(environment.items())
    }


def scrubbed_text(text: str) -> str:
    """`text` without the words that have the shape of a secret, and without values of variables named like one."""
    hide = lambda found: f"{found[1]}={HIDDEN}" if SECRET_NAMES.search(found[1]) else found[0]  # noqa: E731
    return ASSIGNED.sub(hide, SECRET_SHAPES.sub(HIDDEN, text))
