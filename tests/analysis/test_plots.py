"""The contents of the plots, read from the figures that the functions return."""

import csv
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sequencer.analysis import plot_confusion, plot_curves, plot_growth, plot_sweep


def write_metrics(path, rows, **changes):
    """Writes a metrics.csv with `rows` epochs of decreasing loss and increasing top-1.

    `changes` are replaced or additional columns; `__` in a name stands for `/`.
    """
    epochs = range(rows)
    columns = {
        "epoch": [epoch + 1 for epoch in epochs],
        "step": [10 * (epoch + 1) for epoch in epochs],
        "lr": [1e-3] * rows,
        "train/loss": [2 / (1 + epoch) for epoch in epochs],
        "val/loss": [2.1 / (1 + epoch) for epoch in epochs],
        "val/top1": [1 - 0.9 / (1 + epoch) for epoch in epochs],
        "val/top5": [1] * rows,
        "time/epoch_s": [1] * rows,
        "time/images_per_s": [1] * rows,
        **{name.replace("__", "/"): values for name, values in changes.items()},
    }
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def check_image(path):
    with Image.open(path) as image:
        assert len(image.getcolors(maxcolors=1 << 20)) > 10  # not a blank page
        return image.size


@pytest.fixture
def output(tmp_path):
    return tmp_path / "picture.png"


@pytest.mark.parametrize("epochs", [1, 2, 30, 300])
def test_curves(tmp_path, output, epochs):
    figure = plot_curves(write_metrics(tmp_path / "metrics.csv", epochs), output, epochs)
    assert check_image(output) == (1800, 570)
    loss, top1, lr = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Top-1 accuracy", "Learning rate"]
    assert all(axes.get_xlabel() == "epoch" for axes in figure.axes)
    assert loss.get_yscale() == ("log" if epochs > 10 else "linear")
    assert legend(loss) == ["training", "validation"]
    assert legend(top1) == [f"validation: {1 - 0.9 / epochs:.2%} in the best epoch, {epochs}"]
    assert lr.get_legend() is None
    assert list(lr.lines[0].get_xdata()) == list(range(1, epochs + 1))
    assert list(lr.lines[0].get_ydata()) == [1e-3] * epochs
    assert lr.get_ylim()[0] == 0
    assert top1.get_xlim()[0] < 1
    assert top1.get_xlim()[1] > epochs


def test_curves_with_moving_average_and_missing_values(tmp_path, output):
    path = write_metrics(
        tmp_path / "metrics.csv",
        5,
        val__top1=[0.1, "nan", 0.7, "", 0.6],
        val_ema__loss=[2, 1.5, "inf", 1, 1],
        val_ema__top1=[0.1, 0.2, 0.3, 0.4, 0.35],
        val_ema__top5=[1] * 5,
    )
    loss, top1, _ = plot_curves(path, output, 5).axes
    assert legend(loss) == ["training", "validation", "validation, EMA"]
    np.testing.assert_array_equal(loss.lines[4].get_ydata(), [2, 1.5, np.nan, 1, 1])  # an infinite value is a gap
    assert legend(top1) == ["validation: 60.00% in the best epoch, 5", "validation, EMA: 35.00% in the best epoch, 5"]
    marked = [line.get_xydata().tolist() for line in top1.lines if line.get_marker() == "o"]
    assert marked == [[[5, 0.6]], [[1, 0.1], [3, 0.7], [5, 0.6]], [[5, 0.35]], []]


def test_curves_of_a_run_that_diverged(tmp_path, output):
    path = write_metrics(tmp_path / "metrics.csv", 2, val__top1=["nan"] * 2, val__loss=["nan"] * 2)
    top1 = plot_curves(path, output, 1).axes[1]
    assert legend(top1) == ["validation"]


def test_curves_need_an_epoch(tmp_path, output):
    with pytest.raises(ValueError, match="has no epoch"):
        plot_curves(write_metrics(tmp_path / "metrics.csv", 0), output, 1)
    assert not output.exists()


def confusion(num_classes):
    return torch.eye(num_classes, dtype=torch.int64) * 3 + torch.ones(num_classes, num_classes, dtype=torch.int64)


@pytest.mark.parametrize(
    ("num_classes", "named", "note"),
    [(2, 2, ""), (10, 10, ""), (21, 21, ""), (100, 20, " (one in 5 named)"), (1000, 20, " (one in 50 named)")],
)
def test_confusion(output, num_classes, named, note):
    names = [f"class {i}" for i in range(num_classes)]
    axes = plot_confusion(confusion(num_classes), names, output, "a title").axes[0]
    check_image(output)
    assert axes.get_title(loc="left") == "a title"
    assert axes.get_xlabel() == f"predicted class{note}"
    assert axes.get_ylabel() == f"true class{note}"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == names[:: num_classes // named]
    assert labels == [label.get_text() for label in axes.get_xticklabels()]
    texts = [text.get_text() for text in axes.texts]
    total = num_classes * (num_classes + 3)
    assert f"top-1 {4 * num_classes / total:.2%} of {total:,} images" in texts
    assert len(texts) == 1 + (num_classes**2 if num_classes <= 20 else 0)
    np.testing.assert_allclose(axes.images[0].get_array()[0, 0], 4 / (num_classes + 3))


def test_confusion_cells(output):
    counts = np.array([[999, 1, 0], [0, 0, 0], [1, 1, 2]])
    axes = plot_confusion(counts, ["costs $5 or $6", "a name of more than eighteen", "c"], output, "").axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts[:-1]}
    assert cells == {(0, 0): ">99", (1, 0): "<1", (0, 2): "25", (1, 2): "25", (2, 2): "50"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["costs $5 or $6", "a name of more th…", "c"]
    assert np.ma.getmaskarray(axes.images[0].get_array())[1].all() or math.isnan(axes.images[0].get_array()[1, 0])


def test_confusion_cells_below_one_per_cent(output):
    counts = np.array([[989, 5, 6], [0, 1, 0], [9, 10, 981]])
    axes = plot_confusion(counts, ["a", "b", "c"], output, "").axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts[:-1]}
    assert [cells[1, 0], cells[2, 0], cells[0, 2], cells[1, 2]] == ["<1", "<1", "<1", "1"]


def test_confusion_without_predictions(output):
    axes = plot_confusion(np.zeros((2, 2), dtype=np.int64), ["a", "b"], output, "").axes[0]
    assert [text.get_text() for text in axes.texts] == ["no image has a prediction"]


def test_growth(output):
    records = [
        {"quantity": quantity, "value": value, "mode": mode, "contender": name, "median_s": value * cost}
        for quantity, values in {"batch": (1, 2, 4), "steps": (8, 16)}.items()
        for value in values
        for mode in ("train", "inference")
        for name, cost in {"timm": 0.002, "ours": 0.001}.items()
    ]
    figure = plot_growth(records, output)
    check_image(output)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"{mode}, by {quantity}" for mode in ("train", "inference") for quantity in ("batch", "steps")
    ]
    assert legend(figure.axes[0]) == ["timm", "ours"]
    theirs, ours = figure.axes[0].lines
    assert list(theirs.get_xdata()) == [1, 2, 4]
    assert theirs.get_ydata() == pytest.approx([2, 4, 8])  # ms
    assert ours.get_ydata() == pytest.approx([1, 2, 4])
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in figure.axes)
    assert not any(label.get_text() for axes in figure.axes for label in axes.get_yticklabels(minor=True))


def test_sweep_plot(output):
    rows = [("gru 8", "gru", 80, (0.5, 0.6)), ("gru 4", "gru", 40, (0.4,)), ("rnn 8", "rnn", 20, (0.3, 0.2))]
    left, right = plot_sweep(rows, "val/top1", "cells", output).axes
    check_image(output)
    assert [label.get_text() for label in left.get_yticklabels()] == ["gru 8", "gru 4", "rnn 8"]
    means, seeds = left.lines[::2], left.lines[1::2]
    assert [list(line.get_xdata()) for line in seeds] == [[0.5, 0.6], [0.4], [0.3, 0.2]]
    assert [line.get_xdata()[0] for line in means] == pytest.approx([0.55, 0.4, 0.25])
    gru, rnn = right.lines
    assert list(gru.get_xdata()) == [40, 80]
    assert list(rnn.get_xdata()) == [20]
    assert gru.get_ydata() == pytest.approx([0.4, 0.55])
    colours = [line.get_color() for line in means]
    assert colours == [gru.get_color(), gru.get_color(), rnn.get_color()]
    assert len(set(colours)) == 2


def test_sweep_with_many_families_has_one_colour(output):
    rows = [(f"lr {lr}", f"lr {lr}", 50 + lr, (0.5,)) for lr in range(8)]
    left, right = plot_sweep(rows, "val/top1", "rates", output).axes
    check_image(output)
    assert len({line.get_color() for line in [*left.lines[::2], *right.lines]}) == 1


def test_sweep_with_one_model_size_has_one_panel(output):
    rows = [("lr=1", "lr=1", 50, (0.5,)), ("lr=2", "lr=2", 50, (0.6,))]
    assert len(plot_sweep(rows, "val/top1", "rates", output).axes) == 1


def test_sweep_of_losses_has_no_per_cents(output):
    left, _ = plot_sweep([("a", "a", 50, (0.5,)), ("b", "b", 60, (1.5,))], "val/loss", "losses", output).axes
    assert left.get_xlabel() == "val/loss"
    assert not any("%" in label.get_text() for label in left.get_xticklabels())


@pytest.mark.parametrize(
    "parameters", [(480_650, 532_618), (126_538, 337_994), (80_000, 900_000), (10_000, 88_000_000)]
)
def test_labels_of_the_numbers_of_parameters_do_not_overlap(output, parameters):
    rows = [(str(number), str(number), number, (0.5,)) for number in parameters]
    figure = plot_sweep(rows, "val/top1", "sizes", output)
    axes = figure.axes[1]
    low, high = axes.get_xlim()
    boxes = [
        label.get_window_extent()
        for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if low <= tick <= high
    ]
    assert len(boxes) >= 2
    boxes.sort(key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_characters_that_the_font_lacks_are_escaped(output):
    names = ["chat à poil", "\u732b", "\U0001f9a5 dog"]
    axes = plot_confusion(confusion(3), names, output, "\u732b").axes[0]  # a warning of matplotlib is an error
    assert [label.get_text() for label in axes.get_yticklabels()] == ["chat à poil", r"\u732b", r"\U0001f9a5 dog"]
    assert axes.get_title(loc="left") == r"\u732b"
