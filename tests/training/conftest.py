"""Runs that are made once and that several tests compare with or copy."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sequencer.training import run
from tests.helpers import STATEFUL, small_config


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


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of 300 KiB, or of the size that the test is parametrized with."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '300k')}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
