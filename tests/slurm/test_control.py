"""`xdl stop`, `cancel`, `status` on a real Slurm, and what a user may type into text settings."""

import shlex
import shutil
from pathlib import Path

import pytest
from cluster import PATH
from slurm_support import User

TOOLS = ("sbatch", "squeue", "scontrol", "sacct", "scancel", "sinfo")


def test_cancel_ends_everything_and_the_same_launch_goes_on(user: User) -> None:
    user.play(align={"steps": 200, "pause": 0.1})
    user.launch("experts=[math]")
    user.until(lambda: user.checkpoint("align") >= 2)
    user.xdl("cancel", "r")
    user.until(lambda: not user.cluster.run("squeue", "-h", f"--jobs={','.join(user.ids().values())}").strip())
    assert not user.done("align")
    told = {name: job["state"] for name, job in user.status().items()}
    assert {told[name] for name in ("align", "distill-math", "merge", "eval", "report")} == {"cancelled"}
    user.play()
    user.launch("experts=[math]")
    user.until(lambda: user.done("report"))
    assert user.starts("align")[1]["at"] >= 2


def test_status_asks_slurm_as_often_for_64_jobs_as_for_a_few(any_user: User) -> None:
    few, many = any_user, User(any_user.cluster, any_user.folder / "many", any_user.configs)
    many.folder.mkdir()
    (many.folder / "x").touch()
    experts = [f"e{number}" for number in range(64)]
    more = [f"expert.{name}={{sources: {{mine: {{weight: 1.0, kind: jsonl, path: x}}}}}}" for name in experts]
    counts = {}
    for user, arguments in ((few, ["experts=[math]"]), (many, [f"experts=[{','.join(experts)}]", *more])):
        user.play(fetch={}, tokenize={}, cache={}, others={"hold": 2})
        user.launch("stage=distill", "cluster.stages.distill.cpus_per_task=1", *arguments)
        user.until(lambda: user.starts("align"))  # noqa: B023
        counts[user.folder.name] = calls_of(user)
        told = user.status()
        assert told["align"]["state"] == "running"
        assert {told[name]["state"] for name in told if name.startswith("distill")} == {"waiting"}
    assert len(many.status()) >= 64 + 3
    assert len(set(counts.values())) == 1, counts
    many.go("align")
    many.until(lambda: sum(bool(many.starts(f"distill-{name}")) for name in experts) > 8)
    assert calls_of(many) == counts["many"]
    for user in (few, many):
        user.xdl("cancel", "r")


def calls_of(user: User) -> tuple[str, ...]:
    """What `xdl status` calls of Slurm."""
    folder, calls = user.folder / "counted", user.folder / "calls"
    folder.mkdir(exist_ok=True)
    for tool in TOOLS:
        if real := shutil.which(tool, path=PATH):
            (folder / tool).write_text(f'#!/bin/sh\necho {tool} >>{shlex.quote(str(calls))}\nexec {real} "$@"\n')
            (folder / tool).chmod(0o755)
    calls.write_text("")
    user.environment = {"PATH": f"{folder}:{PATH}"}
    try:
        user.status()
    finally:
        user.environment = {}
    assert calls.read_text()
    return tuple(sorted(calls.read_text().split()))


HOSTILE = """$(touch x) `touch x`; touch x & 'it"s' *~ %j $HOME"""


def test_hostile_words_stay_words(user: User) -> None:
    """In every text setting that reaches a script or a command line."""
    user.run = HOSTILE
    quoted = lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"  # noqa: E731
    scratch = str(user.folder / HOSTILE)
    values = {
        "cluster.sbatch.comment": HOSTILE, "cluster.sbatch.account": HOSTILE, "cluster.scratch": scratch,
        "teacher.license": HOSTILE, "teacher.revision": HOSTILE, "teacher.gguf_file": HOSTILE,
        "runs": str(user.folder / "runs"),
    }  # fmt: skip
    user.launch("stage=align", "experts=[math]", *(f"{key}={quoted(value)}" for key, value in values.items()))
    user.until(lambda: user.done("align"))
    (record,) = user.until_ended("align")
    assert record.fields["JobName"] == f"{HOSTILE}.align"
    assert touched(user.folder) == []


@pytest.mark.parametrize("key", ["partition", "constraint", "reservation", "exclude", "nodelist"])
def test_hostile_words_that_slurm_looks_up_are_refused_in_one_line(user: User, key: str) -> None:
    said = user.launch("stage=tokenize", f"cluster.sbatch.{key}='$(touch x);touch x'", code=2)
    assert said.strip().splitlines()[-1].startswith("error: tokenize: sbatch refuses it")
    assert "Traceback" not in said
    assert touched(user.folder) == []


def test_a_folder_that_slurm_cannot_write_logs_below_is_refused_in_one_line(user: User) -> None:
    user.run = r"back\slash"
    said = user.launch("stage=tokenize", code=2)
    assert said.strip().splitlines()[-1].startswith("error: ")
    assert "a name with a backslash" in said
    assert user.submissions() == []


@pytest.mark.parametrize("value", ["a\nb", "a\rb"])
def test_line_breaks_are_refused_in_one_line(user: User, value: str) -> None:
    for key in ("cluster.sbatch.comment", "cluster.scratch", "cluster.stages.align.partition", "name"):
        said = user.xdl("launch", "teacher=tiny", "cluster=slurm", "stage=align", f"{key}='/{value}'", code=2)
        assert said.startswith("error: ")
        assert len(said.strip().splitlines()) == 1
    assert user.submissions() == []


def touched(folder: Path) -> list[Path]:
    """Files that a word would have made, had a shell taken it for a command."""
    return [path for path in folder.rglob("x") if path.is_file()]
