"""The folder in which what was built or measured for this machine is kept."""

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns the folder, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sequencer"


def digest(*parts: str) -> str:
    """Returns the part of a file's name that identifies `parts`."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
