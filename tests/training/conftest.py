"""Runs that are made once and that several tests compare with or copy."""

from pathlib import Path
from typing import Any

import pytest

from sequencer.training import run
from tests.helpers import STATEFUL, small_config


@pytest.fixture(autouse=True)
def _unrendered(unrendered) -> None:
    """No test of this folder looks at a picture of its own run; those of `finished` are rendered."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder of a small finished run, not to be changed, and its summary."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(small_config(folder))


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run with `STATEFUL`, not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(small_config(folder, *STATEFUL))
    return folder
