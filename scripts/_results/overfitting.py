"""The table of LSTM and IndyLSTM trained on few images, of docs/results/overfitting.csv."""

from collections import defaultdict
from statistics import fmean

from _results.common import Row, finished_runs, markdown, paired
from sequencer.analysis.comparison import spread

MODELS = {  # by cell and hidden size; the first is the one that the others are compared with
    ("lstm", "[32]"): "LSTM, 32",
    ("indylstm", "[32]"): "IndyLSTM, 32",
    ("indylstm", "[38]"): "IndyLSTM, 38",
    ("lstm", "[38]"): "LSTM, 38",
}


def overfitting_table() -> str:
    """Loss and top-1 on the images of training, top-1 on those of the test, and the gap between both."""
    found: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in finished_runs("overfitting.csv"):
        found[row["model.kwargs.cell"], row["model.kwargs.hidden_sizes"]][int(row["seed"])] = row
    first = next(iter(MODELS))
    base, lines = _gaps(found[first]), []
    for model, label in MODELS.items():
        runs, gaps = found[model], _gaps(found[model])
        train_loss = f"{fmean(float(row['train/loss']) for row in runs.values()):.0e}"
        test_loss = spread([float(row["test/loss"]) for row in runs.values()], scale=1)
        top1 = [spread([float(row[metric]) for row in runs.values()]) for metric in ("train/top1", "test/top1")]
        beside = "" if model == first else paired(gaps, base)
        parameters = f"{int(runs[min(runs)]['parameters']):,}"
        lines.append(
            (label, parameters, str(len(runs)), train_loss, test_loss, *top1, spread([*gaps.values()]), beside)
        )
    header = ("cell, hidden size", "parameters", "seeds", "training loss", "test loss", "training top-1, %")
    return markdown((*header, "test top-1, %", "gap, points", "minus LSTM, 32 (95% interval)"), lines)


def _gaps(runs: dict[int, Row]) -> dict[int, float]:
    return {seed: float(row["train/top1"]) - float(row["test/top1"]) for seed, row in runs.items()}
