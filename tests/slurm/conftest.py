"""Clusters that live as long as the tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from cluster import ACCOUNTING, SlurmCluster, missing
from slurm_support import User, write_configs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.xdist_group("slurm"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.repeated(N)`: once in `make test`, the other times in `make soak`."""
    if marker := metafunc.definition.get_closest_marker("repeated"):
        again = [pytest.param(number, marks=pytest.mark.soak) for number in range(1, marker.args[0])]
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", [0, *again])


def started(folder: Path, accounting: bool) -> Iterator[SlurmCluster]:
    """A cluster, running; skips where Slurm is not installed, and fails there where XDL_REQUIRE_SLURM=1."""
    if absent := missing():
        told = f"Slurm is not installed here (no {', '.join(absent)}); `make slurm` installs it"
        pytest.fail(told) if os.environ.get("XDL_REQUIRE_SLURM") == "1" else pytest.skip(told)
    cluster = SlurmCluster(folder, accounting=accounting)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Eight nodes with four GPUs each; with accounting where that is installed."""
    yield from started(tmp_path_factory.mktemp("slurm"), not missing(ACCOUNTING))


@pytest.fixture(scope="session")
def plain_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """The same without accounting, so without sacct's answers."""
    if absent := missing(ACCOUNTING):
        told = f"no accounting is installed here (no {', '.join(absent)}): `cluster` has none already"
        pytest.fail(told) if os.environ.get("XDL_REQUIRE_SLURM") == "1" else pytest.skip(told)
    yield from started(tmp_path_factory.mktemp("plain"), False)


@pytest.fixture(params=["cluster", "plain_cluster"])
def any_cluster(request: pytest.FixtureRequest) -> SlurmCluster:
    """With accounting, then without."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def user(cluster: SlurmCluster, tmp_path: Path) -> User:
    """Who uses `cluster`, with stages that only sleep."""
    return User(cluster, tmp_path, write_configs(tmp_path))


@pytest.fixture
def any_user(any_cluster: SlurmCluster, tmp_path: Path) -> User:
    """Who uses a cluster with accounting, then one without."""
    return User(any_cluster, tmp_path, write_configs(tmp_path))


@pytest.fixture(scope="session")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher and a run that is aligned and has its targets cached, on this machine."""
    from test_pipeline import write_configs as write_tiny

    if absent := missing():
        told = f"Slurm is not installed here (no {', '.join(absent)}); `make slurm` installs it"
        pytest.fail(told) if os.environ.get("XDL_REQUIRE_SLURM") == "1" else pytest.skip(told)
    folder = tmp_path_factory.mktemp("aligned")
    write_tiny(folder)
    user = User(SlurmCluster(folder), folder, folder / "configs", stand_in=False)
    # All of the text: trainings that are longer than these take the run up.
    tiny = ("teacher=tiny", "experts=[fox]", "align.batch=8", "data.sources.fox.tokens=0")
    for stage in ("align", "cache"):
        user.xdl("launch", "--name", "r", *tiny, f"stage={stage}", "cluster=local")
    return folder
