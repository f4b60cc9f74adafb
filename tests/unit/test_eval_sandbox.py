"""Programs that a model wrote: what they may not do, and what passes all the same."""

import sys
import tempfile
import time
from pathlib import Path

import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.evaluate import sandbox
from xlstm_distill.evaluate.sandbox import NoNamespaces, Outcome, PassAt1, check_sandbox, run_program

BOTH = pytest.mark.parametrize("confine", [True, False], ids=["confined", "with limits only"])


@pytest.fixture(autouse=True, scope="module")
def namespaces():
    try:
        run_program("pass")
    except NoNamespaces as error:
        pytest.skip(f"no namespaces here: {error}")


@BOTH
@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    return a + b\nassert add(2, 3) == 5",
        "if __name__ == '__main__':\n    import math, re, collections, heapq\n    assert math.sqrt(4) == 2",
        "import numpy as np\nassert np.allclose(np.eye(3) @ np.ones(3), 1)",
        "import threading\nfound = []\nt = threading.Thread(target=found.append, args=(1,))\nt.start()\nt.join()\n"
        "assert found == [1]",
        "open('own', 'w').write('x')\nimport tempfile\nwith tempfile.TemporaryFile() as file:\n    file.write(b'x')\n"
        "assert open('own').read() == 'x'",
    ],
    ids=["sum", "modules", "numpy", "threads", "own folder"],
)
def test_a_right_program_passes(program, confine):
    assert run_program(program, confine) == Outcome(True)


@BOTH
@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended early (exit code 0)"),
        ("import os\nos.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['/bin/true'])", "PermissionError"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "PermissionError"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(32 << 20))", "File too large"),
    ],
    ids=["wrong", "syntax", "exit", "_exit", "fork", "subprocess", "multiprocessing", "allocate", "large file"],
)
def test_a_program_that_fails_ends_early_or_takes_too_much_does_not_pass(program, why, confine):
    outcome = run_program(program, confine)
    assert not outcome.passed
    assert why in outcome.why


@BOTH
@pytest.mark.slow
@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(99)"])
def test_a_program_without_an_end_is_killed(program, confine, monkeypatch):
    monkeypatch.setattr(sandbox, "START_SECONDS", 2.0)
    began = time.monotonic()
    assert "killed" in run_program(program, confine, seconds=1).why
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_fork_bomb_makes_no_process():
    bomb = "import os\nfor i in range(10000):\n    try:\n        os.fork()\n    except PermissionError:\n        pass"
    assert run_program(bomb) == Outcome(True)


@pytest.mark.slow
def test_a_gigabyte_of_output_goes_nowhere():
    program = "import sys\nfor i in range(1 << 10):\n    sys.stdout.write('x' * (1 << 20))"
    assert run_program(program, seconds=30) == Outcome(True)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", "unreachable"),
        ("open('{outside}', 'w').write('x')", "Read-only file system"),
        ("import os\nos.unlink('{victim}')", "Read-only file system"),
        ("import os\nos.kill({pid}, 9)", "ProcessLookupError"),
        ("for i in range(9):\n    open(str(i), 'wb').write(bytes(4 << 20))", "No space left"),
        ("import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0", "AssertionError"),
    ],
    ids=["socket", "write", "remove", "kill", "fill", "mount"],
)
def test_a_confined_program_reaches_nothing_outside(program, why, tmp_path):
    import os
    import socket

    victim = tmp_path / "victim"
    victim.touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = {"port": server.getsockname()[1], "outside": tmp_path / "outside", "victim": victim, "pid": os.getpid()}
        outcome = run_program(program.format(**words))
    assert why in outcome.why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim"]


def test_before_linux_5_12_every_mount_is_made_read_only_by_itself(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(sandbox.CHILD.read_text().replace("libc.syscall(MOUNT_SETATTR,", "libc.syscall(-1,"))
    monkeypatch.setattr(sandbox, "CHILD", child)
    assert run_program("import numpy\nopen('own', 'w').write('x')") == Outcome(True)
    for place in (tmp_path / "outside", "/dev/shm/outside", "/proc/self/oom_score_adj"):
        assert "Read-only file system" in run_program(f"open('{place}', 'w').write('1')").why


def test_a_program_sees_nothing_of_this_process(monkeypatch):
    monkeypatch.setenv("XDL_SECRET", "x")
    monkeypatch.setenv("PYTHONPATH", str(Path(sandbox.__file__).parents[2]))
    program = "import os, sys\nassert 'XDL_SECRET' not in os.environ\nimport importlib.util as u\n"
    assert run_program(f"{program}assert not u.find_spec('sandbox') and '' not in sys.path") == Outcome(True)


def test_nothing_is_left_of_a_program(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_program("open('x', 'w').write('x')", confine=False).passed
    assert not list(tmp_path.iterdir())


def test_pass_at_1_is_the_share_of_the_answers_that_pass():
    metric = PassAt1(confine=True)
    assert metric(references=["assert f() == 1"], predictions=["def f(): return 1"]) == 1
    assert metric(["assert f() == 1"], [["def f(): return 1", "def f(): return 2"]]) == 0.5
    assert PassAt1(True, tested=True)(["[ANSWER]"], [["assert 1", "assert 0"]]) == 0.5
    assert metric.__name__ == "pass@1"


def test_without_leave_nothing_runs():
    with pytest.raises(Mistake, match=r"eval\.allow_code_execution=false: a task runs programs that the model writes"):
        check_sandbox(False)
    check_sandbox(True)


def test_where_there_are_no_namespaces_it_is_refused_unless_told_so(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(sandbox.CHILD.read_text().replace("sum(CLONE.values())", "-1"))
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(
        Mistake, match=r"no namespaces \(unshare: Invalid argument\).*eval.allow_code_execution=unconfined"
    ):
        check_sandbox(True)
    check_sandbox("unconfined")


def test_a_sandbox_in_which_nothing_passes_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(Mistake, match="even a right program does not pass here"):
        check_sandbox(True)
