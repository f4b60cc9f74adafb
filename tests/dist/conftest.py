"""The helpers of the unit tests serve here too."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One after another, on one worker of pytest-xdist: these have several processes each."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("dist"))
