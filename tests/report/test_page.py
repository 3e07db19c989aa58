"""The page of a run: its figures, its texts and, in a browser, what it does."""

import csv
import html
import json
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score

from sequencer.analysis.attribution_plots import overlay
from sequencer.analysis.statistics import wilson
from sequencer.report.charts import Series, line_chart
from sequencer.report.content import cell_label
from sequencer.report.plots import Mistake, plot_mistakes, write_pictures
from sequencer.training import run
from tests.helpers import read_csv, small_config
from tests.report.page_helpers import HOSTILE, Texts, rows_of


@pytest.fixture(scope="module")
def page(hostile_run):
    return (hostile_run / "report.html").read_text(encoding="utf-8")


def embedded(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_one_file_that_asks_for_nothing(page):
    found = Texts(page)
    assert len(page) < 3 * 2**20
    assert [tag for tag, _ in found.elements].count("script") == 2
    for _, attributes in found.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "default-src 'none'" in page


def test_hostile_names_are_text(page):
    found = Texts(page)
    for name in HOSTILE:
        assert name in found.text
    assert not any("alert" in str(attributes.get("onerror")) for _, attributes in found.elements)
    assert "<i>" not in page
    assert "python train.py 'name=<i>'" in found.text
    assert "49" not in [text for text in found.texts if "{{" in text]


def test_key_figures_are_those_of_the_predictions(page, hostile_run):
    rows = read_csv(hostile_run / "report" / "predictions.csv")
    assert len(rows) == 5 * 14 - 2
    hits = sum(row["class"] == row["predicted"] for row in rows)
    top1 = wilson(hits, len(rows))
    text = Texts(page).text
    assert f"top-1 {top1.value:.2%} 95%: {top1.low:.2%} to {top1.high:.2%}" in text
    loss = -np.log([float(row["class_probability"]) for row in rows]).mean()
    assert float(re.search(r"loss ([\d.]+) cross-entropy", text)[1]) == pytest.approx(loss, abs=1e-4)
    summary = json.loads((hostile_run / "summary.json").read_text())
    assert top1.value == pytest.approx(summary["val/top1"])
    assert f"{summary['parameters']:,}" in text


def test_classes_and_confusions_are_those_of_the_predictions(page, hostile_run):
    rows = read_csv(hostile_run / "report" / "predictions.csv")
    pairs = Counter((row["class"], row["predicted"]) for row in rows)
    names = sorted(HOSTILE)
    matrix = [[re.sub(r"<[^>]*>", "", cell) for cell in row[-len(names) :]] for row in rows_of(page, 'class="matrix')]
    assert [[int(cell or 0) for cell in row] for row in matrix] == [[pairs[i, j] for j in names] for i in names]
    for name, row in zip(names, rows_of(page, 'id="class-table"'), strict=True):
        support = sum(pairs[name, j] for j in names)
        called = sum(pairs[i, name] for i in names)
        assert html.unescape(row[0]) == name
        assert int(row[1]) == support
        expected = [f"{100 * pairs[name, name] / n:.1f}%" if n else "\u2013" for n in (called, support)]
        assert [re.sub(r"<small.*", "", cell) for cell in row[2:4]] == expected
    tables = re.findall(r'<table class="pairs">.*?</table>', page, re.DOTALL)
    parts = [rows_of(table, 'class="pairs"') for table in tables]
    shown = [(html.unescape(a), html.unescape(b), int(n)) for rows in parts for a, b, n, *_ in rows]
    counts = sorted((n for (i, j), n in pairs.items() if i != j), reverse=True)
    assert [n for _, _, n in shown] == counts[:20]
    assert all(pairs[i, j] == n for i, j, n in shown)


def test_f1_auc_and_calibration_are_those_of_the_predictions(page, hostile_run):
    rows = read_csv(hostile_run / "report" / "predictions.csv")
    names = sorted(HOSTILE)
    labels, predicted = ([names.index(row[key]) for row in rows] for key in ("class", "predicted"))
    arrays = np.load(hostile_run / "report" / "probabilities.npz")
    assert arrays["label"].tolist() == labels
    f1 = f1_score(labels, predicted, labels=range(5), average=None, zero_division=0)
    for k, row in enumerate(rows_of(page, 'id="class-table"')):
        shown = [re.sub(r"<small.*", "", cell) for cell in row[4:6]]
        area = roc_auc_score(np.array(labels) == k, arrays["probability"][:, k])
        assert shown == [f"{100 * f1[k]:.1f}%" if k in predicted else "\N{EN DASH}", f"{100 * area:.1f}%"]
    confidence = np.array([float(row["probability"]) for row in rows])
    right = np.array(labels) == np.array(predicted)
    bins = np.ceil(confidence * 15)
    error = sum(abs(confidence[bins == k].sum() - right[bins == k].sum()) for k in range(1, 16)) / len(rows)
    said = float(re.search(r"expected calibration error is ([\d.]+)%", Texts(page).text)[1])
    assert said == pytest.approx(100 * error, abs=0.006)


def test_cells_open_images_of_their_kind(page):
    data = embedded(page)
    names = sorted(HOSTILE)
    assert data["cells"]
    for key, numbers in data["cells"].items():
        true, predicted = (names[int(k)] for k in key.split("-"))
        assert 1 <= len(numbers) <= 12
        for number in numbers:
            image = data["images"][number]
            assert image["text"].startswith(predicted)
            assert f"{true}/" in image["id"]
            assert image["uri"].startswith("data:image/webp;base64,")


def test_mistakes_are_the_largest_losses(page, hostile_run):
    rows = read_csv(hostile_run / "report" / "predictions.csv")
    wrong = sorted(
        (row for row in rows if row["class"] != row["predicted"]), key=lambda row: float(row["class_probability"])
    )
    shown = re.findall(
        r'data-top="1">.*?<figcaption>.*?</b>.*?</b>.*?</span><span>(.*?)</span></figcaption>', page, re.DOTALL
    )
    assert [html.unescape(identity) for identity in shown] == [row["id"] for row in wrong[:24]]
    with open(hostile_run / "report" / "mistakes.csv", newline="") as file:
        sources = {row["id"]: row for row in csv.DictReader(file)}
    maps = np.load(hostile_run / "report" / "evidence.npz")
    assert len(maps["map"]) == len(sources)
    for row in wrong[:24]:
        # the logit of the predicted class above that of the true one, from the probabilities
        margin = np.log(float(row["probability"]) / float(row["class_probability"]))
        parts = [float(value) for name, value in sources[row["id"]].items() if name != "id" and value]
        assert sum(parts) == pytest.approx(margin, abs=2e-3)  # the probabilities have six digits


def test_bars_of_every_mistake_have_the_same_rows_and_one_scale(page, hostile_run):
    cards = re.findall(r'<div class="bars">(.*?)</div>', page, re.DOTALL)
    assert len(cards) >= 2
    rows = [
        re.findall(r'<span>([^<]*)</span><i style="width: ([\d.]+)%"[^>]*></i><span>([^<]*)</span>', c) for c in cards
    ]
    with open(hostile_run / "report" / "mistakes.csv", newline="") as file:
        header, *_ = csv.reader(file)
    assert all([name for name, *_ in card] == header[1:] for card in rows)
    assert max(float(width) for card in rows for _, width, _ in card) == 100
    for card, text in zip(rows, cards, strict=True):
        total = float(re.search(r"<b>together</b><b></b><b>([^<]*)</b>", text)[1])
        assert sum(float(value) for *_, value in card) == pytest.approx(total, abs=0.005 * (len(card) + 1))
    assert "-0.00" not in page


def test_cells_say_how_many_of_their_images_are_shown():
    assert cell_label("3", "9", 1, 1) == "3 predicted as 9: 1 image"
    assert cell_label("3", "9", 12, 12) == "3 predicted as 9: 12 images"
    assert cell_label("3", "9", 1022, 12) == "3 predicted as 9: 1,022 images, 12 of them shown"


def test_configuration_warnings_and_unreadable_images(page, hostile_run):
    text = Texts(page).text
    assert "optim.lr 0.02 command line" in text
    assert text.count("no image in one of the formats") >= 2
    assert "2 epochs" in text
    assert "As augmented and mixed" in text


def test_the_card_of_the_model_has_the_figures_of_the_page(page, hostile_run):
    rows = read_csv(hostile_run / "report" / "predictions.csv")
    top1 = wilson(sum(row["class"] == row["predicted"] for row in rows), len(rows))
    card = ModelCard.load(hostile_run / "model" / "README.md")
    lines = card.text.splitlines()
    assert f"On {len(rows)} images of the validation split:" in lines
    assert f"| top-1 | {top1.value:.2%} | 95%: {top1.low:.2%} to {top1.high:.2%} |" in lines
    figures = Texts(page).text
    for name in ("loss", "calibration error", "operations"):
        (row,) = (line for line in lines if line.startswith(f"| {name} |"))
        assert row.strip("| ").replace(" | ", " ") in figures
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results["validation", "accuracy"] == pytest.approx(top1.value)
    assert "<script>" not in card.text
    pairs = Counter((row["class"], row["predicted"]) for row in rows)
    names = sorted(HOSTILE)
    table = [line.strip("| ").split(" | ")[1:] for line in lines if line.startswith("| **")]
    assert table == [[str(pairs[i, j]) for j in names] for i in names]


def test_pictures_of_the_page(hostile_run):
    for name in ("reliability", "mistakes"):
        with Image.open(hostile_run / "report" / f"{name}.png") as picture:
            assert picture.width > 700
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_the_plotted_mistakes(tmp_path):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    values = generator.normal(size=(4, 4))
    mistakes = [
        Mistake(image, values, "a <b>", "$c", "97.1%", "folder/" * 9 + "last.png"),
        Mistake(image, values, "d", "日", "51.0%", "7"),
    ]
    figure = plot_mistakes(mistakes, tmp_path / "mistakes.png", "run: test split")
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[0] == "run: test split, mistakes with the largest loss"
    assert texts[1:3] == ["label: a <b>", "predicted: $c, 97.1%"]
    assert texts[3].startswith("…er/folder/")
    assert texts[3].endswith("/last.png")
    assert texts[4:7] == ["label: d", "predicted: \\u65e5, 51.0%", "7"]
    pictures = [shown.get_array() for shown in axes.get_images()]
    assert np.array_equal(pictures[0], image)
    assert np.array_equal(pictures[1], overlay(image, values, np.abs(values).max()))


def test_pictures_that_would_be_empty_are_not_left_from_before(tmp_path):
    for name in ("reliability.png", "mistakes.png"):
        (tmp_path / name).touch()
    write_pictures(tmp_path, None, [], "title")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_fails_leaves_the_result(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no page")

    monkeypatch.setattr("sequencer.training.result.write_report", fail)
    summary = run(small_config(tmp_path / "run", "trainer.max_epochs=1", "logger.report=true"))
    assert summary["epochs"] == 1
    assert "report.html could not be written: no page" in (tmp_path / "run" / "train.log").read_text()


@pytest.fixture
def opened(open_page, hostile_run):
    return partial(open_page, hostile_run / "report.html")


def test_a_cell_opens_its_images(opened, page):
    tab = opened()
    key, numbers = next(iter(embedded(page)["cells"].items()))
    tab.locator(f'.matrix [data-cell="{key}"]').click()
    assert tab.locator("dialog .gallery img").count() == len(numbers)
    assert "predicted as" in tab.locator("dialog h3").inner_text()
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog").is_visible()


def test_the_table_sorts_both_ways(opened):
    tab = opened()
    head = tab.locator("#class-table thead th").nth(3)

    def values() -> list[float]:
        cells = tab.locator("#class-table tbody td:nth-child(4)")
        return [float(cells.nth(i).get_attribute("data-value")) for i in range(cells.count())]

    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert values() == sorted(values(), reverse=True)
    head.locator("button").press("Enter")
    assert values() == sorted(values())


def test_the_token_under_the_pointer_changes_the_receptive_field(opened):
    tab = opened()
    place = tab.locator("[data-field]").first
    place.scroll_into_view_if_needed()
    field = place.locator(".field")
    positions = set()
    for index in (0, 5, 9):
        place.locator(".grid button").nth(index).hover()
        positions.add(field.evaluate("e => e.style.backgroundPosition"))
    assert len(positions) == 3
    place.locator(".grid button").nth(0).focus()
    tab.keyboard.press("ArrowRight")
    assert "row 1, column 2" in field.get_attribute("aria-label")


def test_charts_show_the_values_under_the_pointer(opened, hostile_run):
    tab = opened()
    chart = tab.locator(".chart").first
    chart.focus()
    tab.keyboard.press("ArrowLeft")
    shown = chart.locator("xpath=..").locator(".values").inner_text()
    first = read_csv(hostile_run / "metrics.csv")[0]
    values = f"training {float(first['train/loss']):.4g}\u2002validation {float(first['val/loss']):.4g}"
    assert shown == f"epoch 1\u2002{values}"
    keys = chart.locator("xpath=..").locator(".values .key")
    assert [keys.nth(i).evaluate("e => e.style.background") for i in range(2)] == [
        "rgb(127, 127, 127)",
        "rgb(0, 114, 178)",
    ]
    rule = chart.locator(".rule").bounding_box()
    picture = chart.locator("svg").bounding_box()
    assert picture["y"] < rule["y"]
    assert rule["y"] + rule["height"] < picture["y"] + 0.9 * picture["height"]


def test_the_filter_shows_the_mistakes_of_a_class(opened):
    tab = opened()
    options = tab.locator("#filter option")
    value = options.nth(1).get_attribute("value")
    tab.locator("#filter").select_option(value)
    labels = {e.get_attribute("data-label") for e in tab.locator("#mistakes figure:visible").all()}
    assert labels == {value}
    assert not tab.locator("#more-mistakes summary").is_visible()
    shown = tab.locator("#mistakes figure:visible").count()
    assert shown == tab.locator(f'#mistakes figure[data-label="{value}"]').count()
    tab.locator("#filter").select_option("")
    assert tab.locator("#mistakes .gallery figure[data-label]:visible").count() == 12
    assert tab.locator("#more-mistakes summary").is_visible()
    tab.locator("#more-mistakes summary").click()
    assert tab.locator("#mistakes .gallery figure[data-label]:visible").count() == 24


@pytest.mark.parametrize(("width", "colour_scheme"), [(1200, "dark"), (390, "light"), (390, "dark")])
def test_it_fits_without_scrolling_sideways(opened, width, colour_scheme):
    tab = opened(width, colour_scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(int(value) for value in re.findall(r"\d+", background)[:3]) < 200
    assert dark == (colour_scheme == "dark")


@pytest.mark.parametrize(
    ("values", "unit"),
    [([0.0, 9.75e-7, 1e-6], ""), ([2.2, 2.25, 2.3], ""), ([0.69, 0.7, 0.72], "%")],
)
def test_ticks_of_a_chart_have_the_same_number_of_decimals(values, unit):
    chart = line_chart("title", np.arange(1.0, 4.0), [Series("a", np.array(values), "#000000")], unit)
    ticks = [text.replace("\u2212", "-") for text in re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)]
    decimals = {len(text.rstrip("%").partition(".")[2]) for text in ticks[ticks.index("epoch") + 1 :] if text != "1e-6"}
    assert len(decimals) == 1


def test_a_chart_of_one_epoch_has_one_tick():
    chart = line_chart("title", np.array([1.0]), [Series("a", np.array([0.5]), "#000000")])
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)
    assert texts[: texts.index("epoch")] == ["1"]
