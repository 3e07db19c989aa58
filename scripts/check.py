"""Runs every check of the project: format, lint, types, import arrows, tests. Stops at the first that fails."""

import subprocess
import sys

CHECKS = (
    ["ruff", "format", "--check", "."],
    ["ruff", "check", "."],
    ["mypy"],
    ["lint-imports"],
    [sys.executable, "-m", "pytest", "--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal"],
)

for check in CHECKS:
    print("+", " ".join(check), flush=True)
    if code := subprocess.run(check).returncode:
        sys.exit(code)
