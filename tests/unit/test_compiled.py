"""Machine code that is kept on disk belongs to the sources as they are, and its absence costs time only."""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from xlstm_distill.data import compiled, ngrams, rans, rows_read, rows_write

HELPER = """
import numba, numpy as np
STEP = 3
TABLE = np.array([10, 20])

@numba.njit(inline="always")
def add(x):
    return x + STEP + TABLE[1]
"""
KERNEL = """
from xlstm_distill.data.compiled import kernel
from {package}.helper import add

@kernel()
def run(x):
    return add(x)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for machine code of this test alone."""
    found = tmp_path / "kept"
    found.mkdir()
    monkeypatch.setattr(compiled, "folder", lambda: found)
    monkeypatch.syspath_prepend(tmp_path)
    return found


def package(folder: Path, name: str, files: dict[str, str]):
    """A package of these modules, as a process that starts now would import it."""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir()
    for file, text in files.items():
        (folder / name / f"{file}.py").write_text(text)
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]
    importlib.invalidate_caches()
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        return importlib.import_module(f"{name}.{list(files)[-1]}")
    finally:
        sys.dont_write_bytecode = before


def test_an_edit_of_a_helper_of_a_constant_or_of_a_table_in_another_file_changes_what_runs(tmp_path, place):
    def run(helper: str) -> tuple[int, int]:
        module = package(tmp_path, "edited", {"helper": helper, "main": KERNEL.format(package="edited")})
        return module.run(1), sum(module.run.stats.cache_hits.values())

    assert run(HELPER) == (24, 0)
    assert run(HELPER) == (24, 1), "the same sources again are not compiled again"
    assert run(HELPER + "\n# a remark") == (24, 1)
    assert run(HELPER.replace("STEP = 3", "STEP = 4")) == (25, 0)
    assert run(HELPER.replace("20]", "30]")) == (34, 0)
    assert run(HELPER.replace("return x + STEP", "return x - STEP")) == (18, 0)
    assert run(HELPER) == (24, 1)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("events", "SLOT_BITS, ID_SLOT_BITS = 10", "SLOT_BITS, ID_SLOT_BITS = 11"),
        ("rows", "LEVEL_BITS = 12", "LEVEL_BITS = 13"),
        ("rows", "8 << octave", "4 << octave"),
        ("rows_both", "(above > 14)", "(above > 15)"),
        ("rows_both", "BLOCK = 8", "BLOCK = 16"),
        ("rans", "state < np.uint64(FIRST)", "state <= np.uint64(FIRST)"),
    ],
)
def test_the_reader_of_targets_is_another_one_after_any_edit_of_what_it_is_made_of(
    tmp_path, place, file, before, after
):
    folder, names = Path(rans.__file__).parent, ["events", "rows", "rows_both", "rans", "rows_read"]
    texts = {name: (folder / f"{name}.py").read_text().replace("xlstm_distill.data.", "copied.") for name in names}
    texts = {name: text.replace("copied.compiled", "xlstm_distill.data.compiled") for name, text in texts.items()}
    original = compiled.fingerprint(package(tmp_path, "copied", texts).read)
    assert original == compiled.fingerprint(rows_read.read)
    assert before in texts[file]
    edited = package(tmp_path, "copied", texts | {file: texts[file].replace(before, after)})
    assert compiled.fingerprint(edited.read) != original


def test_every_kernel_can_be_told_from_an_edited_one():
    kernels = (rans.write, rows_read.read, rows_write.describe, ngrams.grams, ngrams.fill, ngrams.look)
    assert len({compiled.fingerprint(kernel) for kernel in kernels}) == 6


def test_a_kernel_that_names_what_cannot_be_told_from_an_edited_one_is_refused():
    @compiled.kernel()
    def through_a_module(x):
        return os.getpid() + x

    with pytest.raises(TypeError, match="a kernel names <module 'os'"):
        compiled.fingerprint(through_a_module)


@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_damaged_machine_code_is_compiled_anew(tmp_path, place, content):
    files = {"helper": HELPER, "main": KERNEL.format(package="damaged")}
    assert package(tmp_path, "damaged", files).run(1) == 24
    (kept,) = place.iterdir()
    kept.write_bytes(kept.read_bytes()[:100] if content is None else content)
    again = package(tmp_path, "damaged", files)
    assert (again.run(1), sum(again.run.stats.cache_hits.values())) == (24, 0)


def test_without_any_folder_to_write_to_functions_are_compiled_and_run(tmp_path, place, monkeypatch):
    monkeypatch.setattr(compiled, "folder", lambda: None)
    assert package(tmp_path, "nowhere", {"helper": HELPER, "main": KERNEL.format(package="nowhere")}).run(1) == 24
    assert not list(place.iterdir())


@pytest.fixture
def fresh():
    """`folder` without its memory, before and after."""
    compiled.folder.cache_clear()
    yield compiled.folder
    compiled.folder.cache_clear()


def test_machine_code_lies_below_the_cache_folder_or_in_a_temporary_one_that_nobody_else_can_write_to(
    tmp_path, monkeypatch, fresh
):
    temporary = tmp_path / "tmp" / f"xdl-numba-{os.getuid()}"
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert fresh() == tmp_path / "home" / "xdl" / "numba"
    (tmp_path / "file").touch()
    for unusable in (tmp_path / "file", Path("relative")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(unusable))
        fresh.cache_clear()
        assert fresh() == temporary
    temporary.chmod(0o777)  # somebody else may have put code there
    fresh.cache_clear()
    assert fresh() is None
    temporary.rmdir()
    temporary.symlink_to(tmp_path / "home")
    fresh.cache_clear()
    assert fresh() is None


def test_the_codec_and_the_reader_of_shards_import_without_numba():
    code = (
        "import sys, xlstm_distill.data.codec, xlstm_distill.data.prior\n"
        "xlstm_distill.data.codec.Prior.flat(100, 5)\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_values_of_every_kind_that_kernels_name_are_told_apart():
    kinds = [1, 1.0, True, "1", (1,), np.array([1]), np.array([1], np.int32), np.array([[1]])]
    assert len({repr(compiled._parts(kind)) for kind in kinds}) == len(kinds)
