"""The tables and pictures of the ablations, of docs/results/ablations.csv, which `scripts/compare.py` writes."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from _results.common import Row, markdown, paired, read
from sequencer.analysis.comparison import spread


class Model(NamedTuple):
    """A model of the ablations: its settings, and what the paper reports of it."""

    label: str
    settings: Mapping[str, str]
    paper: str = ""  # top-1 on ImageNet, %


BASE = {  # the settings of a trial where nothing else is said
    "model.name": "sequencer2d_p4_32",
    "model.kwargs.cell": "lstm",
    "model.kwargs.union": "cat",
    "model.kwargs.bidirectional": "True",
    "model.kwargs.hidden_sizes": "[32]",
}
LSTM = Model("LSTM", {}, "82.3")
CELLS = [
    LSTM,
    Model("GRU", {"model.kwargs.cell": "gru"}, "82.3"),
    Model("plain RNN", {"model.kwargs.cell": "rnn"}, "80.6"),
    Model("peephole LSTM", {"model.kwargs.cell": "peephole_lstm"}),
    Model("LSTM of 1997", {"model.kwargs.cell": "lstm1997"}),
    Model("IndyLSTM", {"model.kwargs.cell": "indylstm"}),
]
ABLATIONS = {  # the first model of each is the one that the others are compared with
    "cell": CELLS,
    "directions": [LSTM._replace(label="both"), Model("one", {"model.kwargs.bidirectional": "False"}, "79.7")],
}


class Trials(NamedTuple):
    """The trials of a model: its number of parameters, and top-1 by seed."""

    parameters: int
    top1: dict[int, float]

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> "Trials":
        """Returns those with the given settings, and otherwise the settings of `BASE`.

        Raises:
            LookupError: There are none.
        """
        wanted = BASE | dict(settings)
        rows = [row for row in _rows() if all((row.get(key) or BASE[key]) == wanted[key] for key in wanted)]
        if not rows:
            raise LookupError(f"ablations.csv has no finished trial with {wanted}")
        return cls(int(rows[0]["parameters"]), {int(row["seed"]): float(row["test/top1"]) for row in rows})


@functools.cache
def _rows() -> list[Row]:
    return [row for row in read("ablations.csv") if row["state"] == "finished"]


def ablation_table(name: str) -> str:
    """A table of models beside the first, with differences paired by seed."""
    models = ABLATIONS[name]
    base, lines = Trials.of(models[0].settings), []
    for model in models:
        found = Trials.of(model.settings)
        beside = "" if model is models[0] else paired(found.top1, base.top1)
        seeds = str(len(found.top1))
        lines.append((model.label, f"{found.parameters:,}", seeds, spread([*found.top1.values()]), beside, model.paper))
    header = ("", "parameters", "seeds", "top-1, %", f"minus {models[0].label} (95% interval)", "paper, ImageNet, %")
    return markdown(header, lines)


def draw_ablations(folder: Path) -> None:
    """Draws every seed of each ablation, and the means over the number of parameters."""
    from sequencer.analysis.plots import plot_sweep

    for name, models in ABLATIONS.items():
        trials = [(model.label, Trials.of(model.settings)) for model in models]
        rows = [(label, label, found.parameters, [*found.top1.values()]) for label, found in trials]
        plot_sweep(rows, "test/top1", f"ablation_{name}", folder / f"ablation_{name}.png")
