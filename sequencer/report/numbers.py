"""The numbers behind the pictures of the page, as CSV and NPZ files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sequencer.analysis.statistics import Calibration, ClassStatistics
from sequencer.evaluation import Predictions
from sequencer.files import write_arrays, write_csv
from sequencer.report.content import Evidence


def write_numbers(
    folder: Path,
    found: Predictions,
    ids: Sequence[str],
    names: Sequence[str],
    confusion: Any,
    classes: Sequence[ClassStatistics],
    calibrated: Calibration | None,
    evidence: dict[int, Evidence],
) -> None:
    """Writes the numbers behind the pictures as CSV and NPZ."""
    predicted = found.predicted
    rows = []
    for i, (index, label) in enumerate(zip(found.indices, found.labels, strict=True)):
        answer = ("", "") if predicted[i] < 0 else (names[predicted[i]], f"{found.probabilities[i, predicted[i]]:.6f}")
        own = found.probabilities[i, label]
        rows.append((ids[index], names[label], *answer, f"{own:.6f}" if math.isfinite(own) else ""))
    write_csv(folder / "predictions.csv", ("id", "class", "predicted", "probability", "class_probability"), rows)
    write_csv(
        folder / "confusion.csv", ("true class", *names), ((n, *row) for n, row in zip(names, confusion, strict=True))
    )
    columns = [f"{name}{end}" for name in ("precision", "recall", "f1", "auc") for end in ("", "_low", "_high")]
    table = []
    for name, c in zip(names, classes, strict=True):
        table.append((name, c.support, *(_blank(v) for x in (c.precision, c.recall, c.f1, c.auc) for v in x)))
    write_csv(folder / "classes.csv", ("class", "support", *columns), table)
    if calibrated is not None:
        bins = zip(calibrated.counts, calibrated.confidence, calibrated.accuracy, strict=True)
        write_csv(
            folder / "calibration.csv",
            ("images", "confidence", "accuracy"),
            ((n, _blank(c), _blank(a)) for n, c, a in bins),
        )
    if evidence:
        sources = list(dict.fromkeys(source for e in evidence.values() for source in e.sources))
        lines = [
            (ids[found.indices[i]], *(e.sources.get(source, "") for source in sources)) for i, e in evidence.items()
        ]
        write_csv(folder / "mistakes.csv", ("id", *sources), lines)
        maps = np.stack([e.map for e in evidence.values()]).astype(np.float32)
        arrays = {"id": np.array([line[0] for line in lines]), "map": maps}
        write_arrays(folder / "evidence.npz", arrays)
    everything = {"index": found.indices, "label": found.labels, "probability": found.probabilities}
    write_arrays(folder / "probabilities.npz", everything)


def _blank(value: float) -> float | str:
    return value if math.isfinite(value) else ""
