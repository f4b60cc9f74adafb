"""A copy of the package that jobs run: on a cluster they start hours later, when the checkout may have changed."""

import shutil
import sys
from pathlib import Path

from xlstm_distill.contract.files import folder_atomic, hash_file, hash_value


def package_folder() -> Path:
    """Folder of the `xlstm_distill` package in use."""
    return Path(sys.modules["xlstm_distill"].__path__[0])


def _files() -> dict[str, Path]:
    package = package_folder()
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(package).as_posix(): path for path in sorted(files)}


def snapshot_folder(run: Path) -> Path:
    """`code/HASH` of a run for the code as it is now, uncommitted changes included; it need not exist yet."""
    return run / "code" / hash_value({name: hash_file(path) for name, path in _files().items()})


def take_snapshot(run: Path) -> Path:
    """Copy the package into `snapshot_folder` once."""
    folder = snapshot_folder(run)
    if not folder.exists():
        with folder_atomic(folder) as beside:
            for name, path in _files().items():
                (beside / "xlstm_distill" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, beside / "xlstm_distill" / name)
    return folder
