"""The files of an evaluation: evaluation.json, per_class.csv and predictions.csv."""

from pathlib import Path

from sequencer.evaluation.split import Evaluation
from sequencer.files import write_csv, write_json
from sequencer.printing import printable


def write_evaluation(evaluation: Evaluation, folder: Path, model: str) -> None:
    """Writes an evaluation into `folder`, which is created if missing.

    `evaluation.json` holds `Evaluation.record`, `per_class.csv` a row for every class, and `predictions.csv` a row for
    every image: its class, the predicted class and its probability, and the rank of the image's own class. Names are
    written as `printable` shows them.

    Args:
        evaluation: What to write.
        folder: Folder that the files are written to.
        model: What the model was loaded from; noted in `evaluation.json`.
    """
    names, rows = [printable(name) for name in evaluation.class_names], []
    for image, label, predicted, probability, rank in evaluation.outcomes:
        answer = ("", "", "") if predicted is None else (names[predicted], f"{probability:.6f}", rank)
        rows.append((printable(evaluation.ids[image]), names[label], *answer))
    write_csv(folder / "predictions.csv", ("id", "class", "predicted", "probability", "rank"), rows)
    classes = [(printable(row.name), *row[1:]) for row in evaluation.per_class]
    write_csv(folder / "per_class.csv", ("class", "support", "precision", "recall"), classes)
    write_json(folder / "evaluation.json", {"model": model} | evaluation.record())
