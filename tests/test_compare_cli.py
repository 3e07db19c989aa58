"""scripts/compare.py on the same images: output, files and exit codes."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch.utils.flop_counter import FlopCounterMode

from sequencer.config import compose
from sequencer.data import eval_transform, open_split
from sequencer.models import load_model
from sequencer.training import run
from tests.helpers import DIGITS, SMALL, SMALL_MODEL, exit_code, read_csv, save_run

NAMES = list("0123456789")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three runs with untrained weights. Not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    return [save_run(root / f"run{seed}", DIGITS, NAMES, seed) for seed in range(3)]


@pytest.fixture
def script(load_script, folders, tmp_path):
    for folder in folders:
        (tmp_path / folder.name).symlink_to(folder)
    return load_script("compare")


def hits(source: str | Path, split: str = "val", data=DIGITS) -> np.ndarray:
    """Whether a model classifies each image of the digits correctly."""
    images = open_split(data, split, eval_transform(data))
    logits = load_model(source).model.eval()(torch.stack([image for image, _ in images]))
    return logits.argmax(1).numpy() == images.labels


def test_two_models(script, capsys):
    assert exit_code(script, ["run0/model", "run1", "--output", "new/pairs.csv"]) == 0
    a, b = hits("run0"), hits("run1")
    counts = [(a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()]
    (row,) = read_csv(Path("new/pairs.csv"))
    assert [row[key] for key in ("first", "second", "split", "images")] == ["run0/model", "run1", "val", "143"]
    assert [int(row[key]) for key in ("both_right", "only_first", "only_second", "both_wrong")] == counts
    p_value = binomtest(int(counts[1]), int(counts[1] + counts[2])).pvalue
    assert float(row["p_value"]) == float(row["p_value_holm"]) == pytest.approx(p_value)
    assert float(row["first_top1"]) == pytest.approx(a.mean())
    assert float(row["second_top1"]) == pytest.approx(b.mean())
    assert float(row["difference"]) == pytest.approx(a.mean() - b.mean())
    for name in ("first_top1", "second_top1", "difference"):
        assert float(row[f"{name}_low"]) < float(row[name]) < float(row[f"{name}_high"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    bounds = [f"{float(row[f'first_top1_{end}']):.2%}" for end in ("low", "high")]
    assert lines[0] == ["Validation", "split", "of", "digits,", "143", "images:"]
    assert lines[2] == ["A", "run0/model", f"{a.mean():.2%}", bounds[0], "to", bounds[1]]
    assert lines[3][:3] == ["B", "run1", f"{b.mean():.2%}"]
    shares = [f"{100 * float(row[f'difference{end}']):+.2f}" for end in ("", "_low", "_high")]
    assert lines[6] == ["A,", "B", str(counts[1]), str(counts[2]), *shares[:2], "to", shares[2], f"{p_value:.3g}"]
    assert lines[-1] == ["written:", "new/pairs.csv"]


def test_three_models_are_adjusted(script, capsys):
    assert exit_code(script, ["run0", "run1/model", "run2", "--output", "pairs.csv"]) == 0
    rows = read_csv(Path("pairs.csv"))
    names = ["run0", "run1/model", "run2"]
    assert [(row["first"], row["second"]) for row in rows] == [
        (names[0], names[1]), (names[0], names[2]), (names[1], names[2])
    ]  # fmt: skip
    ordered = sorted(rows, key=lambda row: float(row["p_value"]))
    assert float(ordered[0]["p_value_holm"]) == pytest.approx(min(1, 3 * float(ordered[0]["p_value"])))
    assert all(float(a["p_value_holm"]) <= float(b["p_value_holm"]) for a, b in pairwise(ordered))
    printed = capsys.readouterr().out
    assert "p, Holm" in printed.splitlines()[6]
    assert f"{float(rows[0]['p_value_holm']):.3g}" in printed.splitlines()[7].split()[-1]


def test_runs_have_the_table_and_then_the_pairs(script, capsys):
    assert exit_code(script, ["run0", "run1"]) == 0
    table = capsys.readouterr().out
    assert "split of digits" not in table
    assert exit_code(script, ["run0", "run1", "--paired"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(table)
    lines = [line.split() for line in printed.removeprefix(table).splitlines()]
    assert lines[:2] == [[], ["Validation", "split", "of", "digits,", "143", "images:"]]
    assert [line[:3] for line in lines[3:5]] == [
        [letter, name, f"{hits(name).mean():.2%}"] for letter, name in (("A", "run0"), ("B", "run1"))
    ]


def test_the_page_of_runs_without_curves(script, capsys):
    assert exit_code(script, ["run0", "run1", "--html", "new/page.html"]) == 0
    assert capsys.readouterr().out.endswith("p: McNemar's exact test\nwritten: new/page.html\n")
    page = Path("new/page.html").read_text(encoding="utf-8")
    assert "<h1>Comparison of 2 runs</h1>" in page
    assert "No run has curves." in page


def test_the_test_split_on_demand(script, capsys):
    assert exit_code(script, ["run0", "run1/model", "--test"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Test split of digits, 359 images:\n")
    assert f"{hits('run0', 'test').mean():.2%}" in printed


def test_each_model_keeps_its_preprocessing(script, tmp_path, capsys):
    shifted = replace(DIGITS, mean=[0.9])
    save_run(tmp_path / "shifted", shifted, NAMES)
    assert exit_code(script, ["run0", "shifted/model"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[2:4]] == [
        f"{hits('run0').mean():.2%}", f"{hits('shifted', data=shifted).mean():.2%}"
    ]  # fmt: skip


def test_a_folder_of_runs_stands_for_all_of_them(script, folders, capsys):
    assert exit_code(script, [str(folders[0].parent), "run0/model"]) == 0
    models = [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:6]]
    assert models == [*map(str, folders), "run0/model"]


def test_unreadable_images_are_left_out(script, tmp_path, capsys):
    for name in "ab":
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (8, 8), 80 * index).save(tmp_path / "images" / "val" / name / f"{index}.png")
    (tmp_path / "images" / "val" / "a" / "1.png").write_text("no image")
    data = replace(DIGITS, name="imagefolder", root=str(tmp_path / "images"), num_classes=2)
    for seed in range(2):
        save_run(tmp_path / f"small{seed}", data, ["a", "b"], seed)
    assert exit_code(script, ["small0", "small1/model"]) == 0
    assert capsys.readouterr().out.startswith("Validation split of imagefolder, 5 images:\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run0", "--paired"], "error: a comparison on the same images takes two models or more\n"),
        (["run0", "run1", "--slot", "ema"], "error: --slot is of the comparison on the same images: add --paired\n"),
        (["run0", "run1/model", "--html", "page.html"], "error: --html shows runs, and run1/model is none\n"),
        (["run0", "run1", "--html", "run2"], "error: --html run2 is a folder; name a file\n"),
        (
            ["run0", "sequencer2d_s"],
            "error: sequencer2d_s is no file or folder; a timm model needs a data set, with --data NAME\n",
        ),
        (["run0", "letters", "--paired"], "error: run0 and letters have different classes, e.g. 0 and a\n"),
        (["run0", "nine", "--paired"], "error: nine: the model has 9 classes, the data set 10\n"),
        (["run0", "larger", "--paired"], "error: run0 and larger would be evaluated on different images: 143 images "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_requests(arguments, message, script, tmp_path, capsys, monkeypatch):
    if "letters" in arguments:
        save_run(tmp_path / "letters", DIGITS, list("abcdefghij"))
    if "nine" in arguments:
        save_run(tmp_path / "nine", replace(DIGITS, num_classes=None), NAMES[:9])
    if "larger" in arguments:
        save_run(tmp_path / "larger", replace(DIGITS, val_fraction=0.3), NAMES)
    monkeypatch.setattr("sequencer.analysis.paired.evaluate", None)  # nothing is evaluated
    assert exit_code(script, arguments) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not Path("page.html").exists()


def test_speeds(script, capsys, tmp_path):
    run(compose([*SMALL, SMALL_MODEL, "trainer.max_epochs=1", f"run_dir={tmp_path / 'trained'}"]))
    capsys.readouterr()
    assert exit_code(script, ["trained", "--speed", "--output", "speeds.csv"]) == 0
    (row,) = read_csv(Path("speeds.csv"))
    model = load_model("trained").model
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 8, 8))
    assert float(row["speed/operations"]) == counter.get_total_flops()
    assert 1000 / float(row["speed/latency"]) < float(row["speed/inference"])
    assert 0 < float(row["speed/training"]) < float(row["speed/inference"])
    assert f"{float(row['speed/inference']):,.0f}" in capsys.readouterr().out
    assert exit_code(script, ["run0", "run1", "--speed", "--paired"]) == 2
    assert "--speed is of the table of runs" in capsys.readouterr().err
