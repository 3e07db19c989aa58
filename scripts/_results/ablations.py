"""The tables and pictures of the ablations, of docs/results/ablations.csv, which `scripts/compare.py` writes."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from _results.common import finished_runs, markdown, paired
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


def _hidden(size: int, cell: str = "lstm") -> dict[str, str]:
    return {"model.kwargs.hidden_sizes": f"[{size}]", "model.kwargs.cell": cell}


SIZES = (8, 16, 32, 64)
WIDE = _hidden(64)
ABLATIONS = {  # the first model of each is the one that the others are compared with
    "cell": CELLS,
    "directions": [LSTM._replace(label="both"), Model("one", {"model.kwargs.bidirectional": "False"}, "79.7")],
    "union": [
        LSTM._replace(label="concatenated"),
        Model("added", {"model.kwargs.union": "add"}, "82.2"),
        Model("vertical only", {"model.kwargs.union": "vertical"}, "75.6"),
        Model("horizontal only", {"model.kwargs.union": "horizontal"}, "75.0"),
    ],
    "backbone": [
        Model("Sequencer2D, hidden size 32", {}, "82.3"),
        Model("Sequencer2D, 64", WIDE, "82.6"),
        Model("VSequencer, 64", WIDE | {"model.name": "v_sequencer_s"}, "78.0"),
        Model("VSequencer with a position embedding, 64", WIDE | {"model.name": "v_sequencer_s_pe"}, "78.1"),
    ],
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
        runs = finished_runs("ablations.csv")
        rows = [row for row in runs if all((row.get(key) or BASE[key]) == wanted[key] for key in wanted)]
        if not rows:
            raise LookupError(f"ablations.csv has no finished trial with {wanted}")
        return cls(int(rows[0]["parameters"]), {int(row["seed"]): float(row["test/top1"]) for row in rows})


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


def hidden_table() -> str:
    """LSTM beside IndyLSTM at equal hidden sizes and, where the LSTMs enclose it, at equal parameters."""
    lstms, lines = [Trials.of(_hidden(size)) for size in SIZES], []
    for size, lstm in zip(SIZES, lstms, strict=True):
        indylstm = Trials.of(_hidden(size, "indylstm"))
        as_large = _interpolated(lstms, indylstm.parameters)
        own = [text for each in (lstm, indylstm) for text in (f"{each.parameters:,}", spread([*each.top1.values()]))]
        beside = [paired(indylstm.top1, other) if other else "" for other in (lstm.top1, as_large)]
        lines.append((str(size), *own, *beside))
    header = ("hidden size", "LSTM: parameters", "top-1, %", "IndyLSTM: parameters", "top-1, %")
    return markdown((*header, "minus LSTM", "minus LSTM of as many parameters"), lines, texts=0)


def _interpolated(models: Sequence[Trials], parameters: int) -> dict[int, float]:
    """Returns top-1 by seed of a model between two of these, linear in the logarithm of the parameters."""
    for low, high in pairwise(models):
        if low.parameters <= parameters <= high.parameters:
            weight = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
            seeds = low.top1.keys() & high.top1.keys()
            return {seed: (1 - weight) * low.top1[seed] + weight * high.top1[seed] for seed in seeds}
    return {}


def draw_ablations(folder: Path) -> None:
    """Draws every seed of each ablation, and the means over the number of parameters."""
    for name, models in ABLATIONS.items():
        _draw(name, [(model.label, model.label, model.settings) for model in models], folder)
    cells = {"LSTM": "lstm", "IndyLSTM": "indylstm"}
    sizes = [(f"{label}, {size}", label, _hidden(size, cell)) for label, cell in cells.items() for size in SIZES]
    _draw("hidden", sizes, folder)


def _draw(name: str, drawn: Sequence[tuple[str, str, Mapping[str, str]]], folder: Path) -> None:
    """Draws models, each given by its label, the curve that it belongs to, and its settings."""
    from sequencer.analysis.plots import plot_sweep

    trials = [(label, curve, Trials.of(settings)) for label, curve, settings in drawn]
    rows = [(label, curve, found.parameters, [*found.top1.values()]) for label, curve, found in trials]
    plot_sweep(rows, "test/top1", f"ablation_{name}", folder / f"ablation_{name}.png")
