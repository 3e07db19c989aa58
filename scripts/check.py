"""Runs every check but the tests: format, lint, types and import contracts. Exit code 1 if one of them fails.

python scripts/check.py
"""

import subprocess
import sys

CHECKS = (["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"], ["lint-imports"])


def main() -> int:
    failed = []
    for check in CHECKS:
        print("+", *check, flush=True)
        if subprocess.run(check).returncode:
            failed.append(" ".join(check))
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
