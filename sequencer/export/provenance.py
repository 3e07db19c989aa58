"""Versions of packages and the commit that a model was made with."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import sequencer

PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning", "onnx", "onnxruntime")


def versions() -> dict[str, str]:
    """Returns the version of this package and of the installed packages among `PACKAGES`."""
    found = {"sequencer": sequencer.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Returns the commit of this package's git checkout, or None if it is not in one.

    The suffix `-dirty` says that files differ from the commit.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
