"""Writes the records in docs/results/records.csv into README.md and docs/records.md: `python scripts/results.py`.

The tables stand between comments such as `<!-- results: records -->` and `<!-- end -->`. `scripts/record.py` adds to
the CSV file.
"""

import csv
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from sequencer.analysis.comparison import spread

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", DOCS / "records.md"]
Row = dict[str, str]


def main() -> None:
    for page in PAGES:
        page.write_text(fill(page.read_text()))


def fill(text: str) -> str:
    """Replaces what stands between the comments of each table.

    Raises:
        KeyError: There is no table of that name.
    """
    return re.sub(
        r"(<!-- results: (\w+) -->).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def read(name: str) -> list[Row]:
    with open(DOCS / "results" / name, newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose columns are aligned to the right, but for the first `texts`."""
    rule = ["---" if index < texts else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


class Record(NamedTuple):
    """The seeds of one command on one machine, from one commit."""

    seeds: list[Row]

    @property
    def command(self) -> str:
        return self.seeds[0]["command"]

    def cells(self) -> tuple[str, ...]:
        """The cells of `HEADER`."""
        first, minutes = self.seeds[0], [float(row["minutes"]) for row in self.seeds]
        values = [float(row["top1"]) for row in self.seeds]
        return (
            ", ".join(row["seed"] for row in self.seeds),
            ", ".join(f"{100 * value:.2f}" for value in values),
            spread(values),
            f"{min(minutes):.1f} to {max(minutes):.1f}",
            f"{first['machine']}, torch {first['torch'].split('+')[0]}",
            f"`{first['commit']}`",
        )


def records() -> list[Record]:
    """All records, the newest first."""
    about = ("date", "command", "machine", "torch", "commit")
    groups = groupby(read("records.csv"), key=lambda row: [row[name] for name in about])
    return [Record(list(rows)) for _, rows in groups][::-1]


HEADER = ("seeds", "top-1, %", "mean ± deviation", "minutes", "machine", "commit")


def records_table() -> str:
    rows = [(record.seeds[0]["date"], f"`{record.command}`", *record.cells()) for record in records()]
    return markdown(("date", "command", *HEADER), rows, texts=2)


def latest_table() -> str:
    """The newest record of each command."""
    newest: dict[str, Record] = {}
    for record in records():
        newest.setdefault(record.command, record)
    return markdown(("command", *HEADER), [(f"`{name}`", *record.cells()) for name, record in newest.items()])


TABLES: dict[str, Callable[[], str]] = {"records": records_table, "latest": latest_table}

if __name__ == "__main__":
    main()
