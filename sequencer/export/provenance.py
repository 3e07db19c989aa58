"""What a model was made with, for whoever meets it later."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import sequencer

PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning", "onnx", "onnxruntime")


def versions() -> dict[str, str]:
    """Version by package, of those that are installed."""
    found = {"sequencer": sequencer.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of this package's checkout, with `-dirty` after it where files differ; None without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
