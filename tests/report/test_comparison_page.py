"""The page that shows runs side by side: its figures, its texts and, in a browser, what it does."""

import html
import re
from dataclasses import replace
from shutil import copy

import numpy as np
import pytest
import torch

from sequencer.analysis import compare, find_runs
from sequencer.analysis.paired import evaluate_paired
from sequencer.analysis.statistics import holm
from sequencer.data import eval_transform, open_split
from sequencer.evaluation import evaluation_data
from sequencer.models import load_model
from sequencer.report import write_comparison
from sequencer.report.charts import comparison_charts
from tests.helpers import read_csv
from tests.report.page_helpers import HOSTILE, Texts, rows_of


@pytest.fixture(scope="module")
def evaluated(hostile_run, other_hostile_run):
    """The table of two runs, their folders in its order, and their evaluation."""
    table = compare([hostile_run, other_hostile_run])
    folders = [run.folder for row in table.rows for run in row.runs]
    models = [load_model(folder) for folder in folders]
    data = [evaluation_data(model) for model in models]
    return table, folders, evaluate_paired([str(folder) for folder in folders], models, data, "val")


@pytest.fixture(scope="module")
def compared(evaluated, tmp_path_factory):
    """The page of two runs, and their folders in the order of the page."""
    table, folders, paired = evaluated
    path = tmp_path_factory.mktemp("comparison") / "page.html"
    write_comparison(table, paired, path)
    return path, folders


@pytest.fixture(scope="module")
def page(compared):
    return compared[0].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def answers(compared):
    """The ids of the images, the labels, and the probabilities of both models, computed anew."""
    models = [load_model(folder).model.eval() for folder in compared[1]]
    data = evaluation_data(load_model(compared[1][0]))
    split = open_split(data, "val", eval_transform(data))
    images, labels, indices = (torch.cat(parts) for parts in zip(*split.evaluation_loader(data), strict=True))
    with torch.no_grad():
        probabilities = [model(images).softmax(1).numpy() for model in models]
    return [split.ids[index] for index in indices], labels.numpy(), probabilities


def test_one_file_that_asks_for_nothing(page):
    found = Texts(page)
    assert len(page) < 3 * 2**20
    for _, attributes in found.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "default-src 'none'" in page


def test_hostile_names_are_text(page):
    assert "<script>alert" not in page
    assert "run <b>" not in page
    assert "run <b>" in Texts(page).text
    labels = {html.unescape(label) for label in re.findall(r"labelled <b>(.*?)</b>", page)}
    assert labels
    assert labels <= set(HOSTILE)


def test_figures_are_those_of_the_predictions(page, answers):
    _, labels, probabilities = answers
    assert len(labels) == 5 * 14 - 2
    a, b = (p.argmax(1) == labels for p in probabilities)
    row = [re.sub(r"<small.*", "", cell) for cell in rows_of(page, 'id="pairs"')[0]]
    assert row[:2] == ["A, B", f"{100 * (a.mean() - b.mean()):+.2f}"]
    counts = [(a & ~b).sum(), (~a & b).sum(), (a & b).sum(), (~a & ~b).sum()]
    assert [int(cell) for cell in row[3:]] == counts
    assert counts[0] + counts[1] > 0
    shown = [re.sub(r"<small.*", "", row[3]) for row in rows_of(page, 'id="run-table"')]
    assert shown == [f"{100 * right.mean():.1f}%" for right in (a, b)]
    assert f"{a.mean():.2%} top-1" in Texts(page).text


def test_galleries_show_what_one_run_alone_classifies_correctly(page, answers):
    ids, labels, probabilities = answers
    right = [p.argmax(1) == labels for p in probabilities]
    sections = page.split(" wrong: ")[1:]
    assert len(sections) == 2
    for section, (i, j) in zip(sections, ((0, 1), (1, 0)), strict=True):
        places = np.flatnonzero(right[i] & ~right[j])
        places = places[np.argsort(-probabilities[j][places].max(axis=1), kind="stable")]
        assert section.startswith(f"{len(places)} image")
        names = [html.unescape(name) for name in re.findall(r"<br>([^<]*\.png)</figcaption>", section)]
        assert names == [ids[place] for place in places[:24]]


def test_differences_and_curves(page, compared):
    keys = {row[0]: row[1:] for row in rows_of(page, 'id="differences"')}
    seeds = [str(int(folder.name == "run <b>")) for folder in compared[1]]
    assert keys == {
        "seed": seeds,
        "trainer.max_epochs": [{"0": "2", "1": "3"}[seed] for seed in seeds],
    }
    assert "Validation top-1" in Texts(page).text


@pytest.mark.parametrize(("number", "galleries"), [(3, 6), (7, 2)])
def test_more_runs(evaluated, tmp_path, number, galleries):
    _, folders, paired = evaluated
    for place in range(number):
        (tmp_path / f"run{place}").mkdir()
        for name in ("config.yaml", "summary.json", "metrics.csv"):
            copy(folders[place % 2] / name, tmp_path / f"run{place}")
    outcomes = [paired.outcomes[place % 2] for place in range(number)]
    several = replace(paired, sources=[str(place) for place in range(number)], outcomes=outcomes)
    write_comparison(compare(find_runs([tmp_path])), several, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count(" wrong: ") == galleries
    assert ("of the two best runs" in page) == (number > 3)
    pairs = rows_of(page, 'id="pairs"')
    assert [row[0] for row in pairs[:2]] == ["A, B", "A, C"]
    adjusted = holm([pair.result.p_value for pair in several.pairs])
    assert [row[3] for row in pairs] == [f"{value:.3g}" for value in adjusted]
    assert len(set(re.findall(r'<td><span class="key" style="background: (#\w+)', page))) == number


def test_curves_are_those_of_the_weights_that_are_kept():
    columns = {"epoch": np.array([1.0]), "val/top1": np.array([0.25]), "val_ema/top1": np.array([0.5])}
    (chart,) = comparison_charts([("A", "#000000", columns), ("B", "#ffffff", columns)], ["val", "val_ema"])
    assert chart.pointer["rows"] == [["epoch 1", "25%", "50%"]]


def test_charts_show_the_values_of_every_run(open_page, compared):
    path, folders = compared
    tab = open_page(path)
    chart = tab.locator(".chart").first
    chart.focus()
    shown = chart.locator("xpath=..").locator(".values").inner_text()
    values = []
    for place, folder in enumerate(folders):
        rows = read_csv(folder / "metrics.csv")
        value = f"{100 * float(rows[2]['val/top1']):.4g}%" if len(rows) > 2 else "-"
        values.append(f"\u2002{'AB'[place]} {value}")
    assert shown == "epoch 3" + "".join(values)
    colours = {tab.locator("#run-table .key").nth(i).evaluate("e => e.style.background") for i in range(2)}
    assert len(colours) == 2


def test_the_table_of_runs_sorts(open_page, compared):
    tab = open_page(compared[0])
    head = tab.locator("#run-table thead th").nth(3)
    head.locator("button").click()
    cells = tab.locator("#run-table tbody td:nth-child(4)")
    values = [float(cells.nth(i).get_attribute("data-value")) for i in range(2)]
    assert values == sorted(values, reverse=True)
    head.locator("button").click()
    assert [float(cells.nth(i).get_attribute("data-value")) for i in range(2)] == sorted(values)


@pytest.mark.parametrize(("width", "colour_scheme"), [(1200, "dark"), (390, "light"), (390, "dark")])
def test_it_fits_without_scrolling_sideways(open_page, compared, width, colour_scheme):
    tab = open_page(compared[0], width, colour_scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(int(value) for value in re.findall(r"\d+", background)[:3]) < 200
    assert dark == (colour_scheme == "dark")
