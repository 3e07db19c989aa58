"""The tables of records, of docs/results/records.csv."""

from itertools import groupby
from typing import NamedTuple

from _results.common import RESULTS, Row, markdown, read
from sequencer.analysis.comparison import spread

HEADER = ("seeds", "top-1, %", "mean ± deviation", "minutes", "machine", "commit")


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
    groups = groupby(read(RESULTS / "records.csv"), key=lambda row: [row[name] for name in about])
    return [Record(list(rows)) for _, rows in groups][::-1]


def records_table() -> str:
    rows = [(record.seeds[0]["date"], f"`{record.command}`", *record.cells()) for record in records()]
    return markdown(("date", "command", *HEADER), rows, texts=2)


def latest_table() -> str:
    """The newest record of each command."""
    newest: dict[str, Record] = {}
    for record in records():
        newest.setdefault(record.command, record)
    return markdown(("command", *HEADER), [(f"`{name}`", *record.cells()) for name, record in newest.items()])
