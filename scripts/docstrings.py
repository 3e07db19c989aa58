"""Prints docstrings of the package drawn at random, to be read without the code beside them.

python scripts/docstrings.py --number 10 --seed 0
"""

import ast
import random
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sequencer"


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--number", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = [entry for path in sorted(PACKAGE.rglob("*.py")) for entry in docstrings(path)]
    for place, text in random.Random(args.seed).sample(found, min(args.number, len(found))):
        print(f"{place}\n    {text.replace(chr(10), f'{chr(10)}    ')}\n")


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the place and the text of every docstring of a file."""
    place = str(path.relative_to(PACKAGE.parent))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module):
            name = place
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{place}:{node.name}"
        else:
            continue
        if text := ast.get_docstring(node):
            yield name, text


if __name__ == "__main__":
    main()
