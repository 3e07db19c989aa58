"""The page of a run, `report.html`, and the numbers behind its pictures."""

import csv
import itertools
import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sequencer.analysis.paired import SPLITS
from sequencer.analysis.plots import read_columns
from sequencer.analysis.receptive_field import token_fields
from sequencer.analysis.statistics import (
    Calibration,
    class_statistics,
    confused_pairs,
)
from sequencer.config.schema import Config, leaves
from sequencer.config.sources import DEFAULTS
from sequencer.data.mixing import build_mixup
from sequencer.evaluation import describe_figures, short_number
from sequencer.files import write_arrays, write_atomically
from sequencer.models import KeyFigures, Sequencer
from sequencer.printing import printable
from sequencer.report.charts import reliability_chart, run_charts
from sequencer.report.content import (
    MOST_PAIRS,
    SMALL,
    Cards,
    cell_label,
    draw,
    is_decomposable,
    label_error_cards,
    matrix_of,
    mistake_cards,
    select,
    to_pixels,
)
from sequencer.report.numbers import write_numbers
from sequencer.report.pictures import field_sheet, thumbnail
from sequencer.report.plots import first_mistakes, write_pictures
from sequencer.report.rendering import duration, render
from sequencer.report.results import Results
from sequencer.report.subject import Subject

log = logging.getLogger("sequencer")

PAIRS_SHOWN, MISTAKES_SHOWN = 8, 12  # the others are folded
BATCH_IMAGES = 16
LEAST_SHARE = 0.1  # of a target, to be shown
FIELD_IMAGES = 8
FIELD_SIZE = 64  # pixels up to which receptive fields are computed unasked
NO_EVIDENCE = "Evidence maps and directions are defined for Sequencer models with average pooling."
SECTIONS = (
    ("run", "Run"),
    ("curves", "Curves"),
    ("classes", "Classes"),
    ("mistakes", "Mistakes"),
    ("calibration", "Calibration"),
    ("seen", "What it saw"),
    ("configuration", "Configuration"),
)


def write_report(subject: Subject, results: Results, run_dir: Path, fields: bool = False) -> Path:
    """Writes `report.html` and the folder `report/` of a run.

    Args:
        subject: The run.
        results: Of its model, on `subject.split`.
        run_dir: Its folder, with `metrics.csv` and, where there are any, `train.log` and `bad_samples.csv`.
        fields: Whether to compute receptive fields also for images above 64 px, a backward pass for each token.

    Returns:
        The path of the page.
    """
    numbers = run_dir / "report"
    numbers.mkdir(exist_ok=True)
    found, confusion, calibrated, figures = results
    names = [printable(name) for name in subject.split.class_names]
    ids = [printable(identity) for identity in subject.split.ids]
    classes = class_statistics(found.labels, found.predicted, found.probabilities)
    selection = select(found, confusion)
    pictures = draw(selection, found, subject.split, subject.config.data, subject.model, subject.device)
    cards = Cards(found, pictures, ids, names, subject.config.data.img_size)
    matrix, cells = matrix_of(confusion, selection, cards, names)
    mistakes = mistake_cards(selection, found, pictures, cards, names)
    charts = run_charts(read_columns(run_dir / "metrics.csv"), subject.summary["best_epoch"])
    curves = list(range(len(charts)))
    if calibrated is not None:
        charts.append(reliability_chart(calibrated))
    sheets, fields_text = _fields(subject, numbers, fields)
    settings = _settings(subject)
    context = {
        "title": f"{subject.config.name}: {subject.config.model.name}",
        "subtitle": f"{SPLITS[subject.split_name]} of {subject.config.data.name}, {len(found.labels):,} images",
        "figures": _figures(subject, figures),
        "facts": _facts(subject),
        "command": _command(subject),
        "sections": SECTIONS,
        "best_epoch": subject.summary["best_epoch"],
        "charts": charts,
        "curves": curves,
        "reliability": len(curves) if calibrated is not None else None,
        "calibration_text": _calibration_text(calibrated),
        "class_names": names,
        "matrix": matrix,
        "pairs_shown": PAIRS_SHOWN,
        "pairs": _pairs(confusion, names, cells),
        "classes": [{"name": name, **row._asdict()} for name, row in zip(names, classes, strict=True)],
        "mistakes": mistakes,
        "mistakes_shown": MISTAKES_SHOWN,
        "mistaken": sorted({(card["label_index"], card["label"]) for card in mistakes}),
        "evidence": is_decomposable(subject.model),
        "no_evidence": NO_EVIDENCE,
        "label_errors": label_error_cards(selection, found, pictures, cards, names),
        "batch": _batch(subject, names),
        "mixed": build_mixup(subject.config.data.augment, len(names)) is not None,
        "fields": sheets,
        "fields_text": fields_text,
        "warnings": _warnings(run_dir / "train.log"),
        "unreadable": _unreadable(run_dir / "bad_samples.csv"),
        "changed": [row for row in settings if row[2] != "schema"],
        "settings": settings,
    }
    script = {
        "charts": [chart.pointer for chart in charts],
        "images": cards.images,
        "cells": cells,
        "fields": [{"rows": s["rows"], "columns": s["columns"], "sheet": s["sheet"]} for s in sheets],
    }
    page = run_dir / "report.html"
    write_atomically(page, lambda path: path.write_text(render("report.html", context, script), encoding="utf-8"))
    shown = first_mistakes(selection, found, pictures, ids, names)
    write_pictures(numbers, calibrated, shown, f"{subject.config.name}: {subject.split_name} split")
    write_numbers(numbers, found, ids, names, confusion, classes, calibrated, pictures.evidence)
    return page


def _figures(subject: Subject, figures: KeyFigures) -> list[tuple[str, str, str]]:
    """Name, value and note of the key figures."""
    epochs = subject.summary["epochs"]
    return [
        *describe_figures(figures),
        ("parameters", short_number(subject.summary["parameters"]), f"{subject.summary['parameters']:,}"),
        ("training", duration(subject.summary["time/train_s"]), "1 epoch" if epochs == 1 else f"{epochs} epochs"),
    ]


def _facts(subject: Subject) -> list[tuple[str, str]]:
    config, summary = subject.config, subject.summary
    return [
        ("model", f"{config.model.name}, {summary['slot']} weights of epoch {summary['best_epoch']}"),
        ("data", f"{config.data.name}: {len(subject.train):,} images to train, {len(subject.split):,} to evaluate"),
        ("seed", str(config.seed)),
        *((name, printable(value)) for name, value in subject.facts.items()),
    ]


def _command(subject: Subject) -> str:
    """The command of the run or, where it is not known, one that gives every value that differs from the defaults."""
    if subject.origin.get("command"):
        return printable(shlex.join(subject.origin["command"]))
    changed = {key: value for key, value in _leaves(subject.config).items() if value != DEFAULTS.get(key)}
    return printable(
        shlex.join(["python", "train.py", *(f"{key}={_override(value)}" for key, value in changed.items())])
    )


def _override(value: Any) -> str:
    return "null" if value is None else str(value)


def _leaves(config: Config) -> dict[str, Any]:
    return {key: value for key, value in leaves(asdict(config)).items() if key != "run_dir"}


def _settings(subject: Subject) -> list[tuple[str, str, str]]:
    sources = subject.origin.get("sources", {})
    return [
        (key, printable(str(value)), sources.get(key, "schema" if value == DEFAULTS.get(key) else "not known"))
        for key, value in _leaves(subject.config).items()
    ]


def _pairs(confusion: Any, names: Sequence[str], cells: dict[str, list[int]]) -> list[dict[str, Any]]:
    support = confusion.sum(axis=1)
    return [
        {
            "label": names[i],
            "predicted": names[j],
            "count": count,
            "share": count / support[i],
            "key": key if (key := f"{i}-{j}") in cells else None,
            "text": cell_label(names[i], names[j], count, len(cells.get(key, ()))),
        }
        for i, j, count in confused_pairs(confusion)[:MOST_PAIRS]
    ]


def _calibration_text(found: Calibration | None) -> str:
    if found is None:
        return "No image has a finite prediction."
    sure = "more sure than right" if found.temperature > 1 else "less sure than right"
    return (
        f"The expected calibration error is {found.error:.2%}. The model is {sure}: its logits divided by a "
        f"temperature of {found.temperature:.2f} have the least cross-entropy on these images, with an error of "
        f"{found.error_at_temperature:.2%}. Fitted on the images that it is measured on, this is a lower bound of what "
        "recalibration on other images reaches. The area of a dot is the share of images in its bin."
    )


def _batch(subject: Subject, names: Sequence[str]) -> list[dict[str, Any]]:
    """The first images of the first training batch, as augmented and mixed."""
    data = subject.config.data
    images, labels = next(iter(subject.train.training_loader(data, subject.config.seed)))
    if (mix := build_mixup(data.augment, len(names))) is not None:
        state = np.random.get_state()
        np.random.seed(subject.config.seed)  # timm's source of the mixing; the page repeats
        images, targets = mix(images, labels)
        np.random.set_state(state)
    else:
        targets = torch.nn.functional.one_hot(labels, len(names)).float()
        targets = targets * (1 - data.augment.smoothing) + data.augment.smoothing / len(names)
    found = []
    for pixels, target in zip(to_pixels(images[:BATCH_IMAGES], data), targets[:BATCH_IMAGES], strict=True):
        shares = sorted(((float(share), name) for share, name in zip(target, names, strict=True)), reverse=True)
        shown = [(name, f"{share:.0%}") for share, name in shares[:2] if share >= LEAST_SHARE]
        text = ", ".join(" ".join(pair) for pair in shown)
        found.append({"uri": thumbnail(pixels), "id": text, "shares": shown, "small": data.img_size <= SMALL})
    return found


def _fields(subject: Subject, folder: Path, wanted: bool) -> tuple[list[dict[str, Any]], str]:
    """The receptive fields of each stage for the template, and a sentence about them."""
    model, size = subject.model, subject.config.data.img_size
    if not isinstance(model, Sequencer):
        return [], "Receptive fields of tokens are shown for Sequencer models."
    if size > FIELD_SIZE and not wanted:
        return (
            [],
            f"For images of {size} px, python scripts/report.py RUN --receptive-fields computes receptive fields.",
        )
    loader = subject.split.evaluation_loader(subject.config.data)
    images = torch.cat([batch[0] for batch in itertools.islice(loader, 1)])[:FIELD_IMAGES].to(subject.device)
    background = thumbnail(to_pixels(images, subject.config.data).mean(axis=0).round().astype(np.uint8))
    sheets, arrays = [], {}
    for stage in range(len(model.stages)):
        fields = token_fields(model, images, stage)
        arrays[f"stage_{stage}"] = fields.astype(np.float32)
        sheet = {"rows": fields.shape[0], "columns": fields.shape[1], "sheet": field_sheet(fields)}
        sheets.append(sheet | {"title": f"Stage {stage}", "background": background})
    write_arrays(folder / "receptive_fields.npz", arrays)
    text = f"The effective receptive fields of tokens at the end of each stage, mean of {len(images)} images"
    return sheets, f"{text} (positive part of the gradient, as in the paper's code)."


def _warnings(train_log: Path) -> list[str]:
    if not train_log.is_file():
        return []
    with open(train_log, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\n").split(" WARNING ", 1) for line in file if " WARNING " in line]
    return list(dict.fromkeys(printable(line[1]) for line in lines))


def _unreadable(bad_samples: Path) -> list[tuple[str, str, str]]:
    if not bad_samples.is_file():
        return []
    with open(bad_samples, newline="", encoding="utf-8", errors="replace") as file:
        return [(row["path"], row["split"], row["reason"]) for row in csv.DictReader(file)]
