"""Where `configs/` and `slurm/` lie: inside the installed wheel, or at the root of a checkout."""

from pathlib import Path

from xlstm_distill.contract.exitcode import Mistake


def data_folder(name: str) -> Path:
    """Folder `configs` or `slurm`.

    Raises:
        Mistake: neither the wheel nor the checkout has it.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_data" / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise Mistake(f"{name}/: not found in {package}/_data nor in {package.parent}; install xdl again")
