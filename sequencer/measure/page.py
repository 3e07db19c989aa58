"""A page about all measurements of a device, in Markdown, for `docs/performance.md`."""

import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from sequencer.files import write_atomically
from sequencer.measure.contenders import choose_backends
from sequencer.measure.correctness import check_layers


class Page:
    """The page, which is written again after every section, so that nothing is lost when a later one fails.

    Args:
        path: The file.
        machine: What `describe_machine` returns.

    Attributes:
        failures: Titles of the sections whose measurement failed.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.failures: list[str] = []
        described = ", ".join(f"{name} {value}" for name, value in machine.items())
        self._sections = [f"# {machine['device']}\n\n{described}\n"]
        self._gains: list[str] = []

    def check(self, device: torch.device, dtypes: Sequence[str]) -> None:
        """Checks our layers in all dtypes; adds a table of their errors.

        Raises:
            RuntimeError: Outputs or gradients are wrong or not reproducible.
        """
        rows = ["| dtype | backend | hidden size | largest error |", "| --- | --- | --- | ---: |"]
        for name in dtypes:
            dtype = getattr(torch, name)
            backend = choose_backends(None, device, dtype)[0]
            for hidden_size, error in check_layers(device, dtype, backend):
                print(f"correct: {name}, {backend}, D {hidden_size}, error {error:.1e}")
                rows.append(f"| {name} | {backend} | {hidden_size} | {error:.1e} |")
        self._add("Correctness", "\n".join(rows))

    def measure(
        self, title: str, arguments: list[str], main: Callable[[list[str]], int], folder: Path | None = None
    ) -> None:
        """Runs a sub-command of `benchmark.py`; adds what it prints, and from its records the gains over timm.

        Args:
            title: Title of the section.
            arguments: The sub-command and its options.
            main: Runs them and returns the exit code.
            folder: Its output folder, if it has one.
        """
        printed = _Copied(sys.stdout)
        with redirect_stdout(printed), redirect_stderr(printed):
            code = main(arguments)
        if code:
            self.failures.append(title)
        elif folder is not None:
            self._gains += gains(title, json.loads((folder / "benchmark.json").read_text())["results"])
        command = f"`python scripts/benchmark.py {' '.join(arguments)}`"
        self._add(title, f"{command}\n\n```\n{printed.getvalue().strip()}\n```")

    def _add(self, title: str, text: str) -> None:
        self._sections.append(f"## {title}\n\n{text}\n")
        table = [
            "| measurement | shape | mode | speed over timm's best | memory over timm's least |",
            "| --- | --- | --- | ---: | ---: |",
            *self._gains,
        ]
        first, *rest = self._sections
        summary = ["\n".join(["## Summary\n", *table, ""])] if self._gains else []
        content = "\n".join([first, *summary, *rest])
        write_atomically(self.path, lambda path: path.write_text(content))


class _Copied(io.StringIO):
    """Keeps what is written, and writes it to another stream as well."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(text)
        self._stream.flush()
        return super().write(text)


def gains(title: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of the summary: our fastest contender, without recomputation, and timm's best, for every shape and mode."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        shape = ", ".join(f"{key} {record[key]}" for key in ("shape", "quantity", "value", "batch") if key in record)
        groups.setdefault((shape, record["mode"]), []).append(record)
    rows = []
    for (shape, mode), group in groups.items():
        peers = [r for r in group if r["contender"].startswith("timm")]
        ours = [
            r for r in group if r["contender"].startswith(("lstm, ", "sequencer")) and "recompute" not in r["contender"]
        ]
        best = min(ours, key=lambda record: record["median_s"])
        speed = min(r["median_s"] for r in peers) / best["median_s"]
        least = [r["peak_memory_bytes"] for r in peers if r["peak_memory_bytes"]]
        memory = f"{best['peak_memory_bytes'] / min(least):.2f}" if least and best["peak_memory_bytes"] else ""
        rows.append(f"| {title} | {shape} | {mode} | {speed:.2f} | {memory} |")
    return rows
