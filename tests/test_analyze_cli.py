"""scripts/analyze.py: tables, pictures, files and exit codes."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from sequencer.data import eval_transform, read_image
from sequencer.evaluation import input_config
from sequencer.models import load_model
from tests.helpers import DIGITS, exit_code, read_csv, save_run

NAMES = [f"class {k}" for k in range(9)] + ["\x1b[31mred"]


@pytest.fixture
def run_folder(tmp_path):
    return save_run(tmp_path / "run", DIGITS, NAMES)


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.RandomState(seed).randint(256, size=(9, 11, 3), dtype=np.uint8)).save(path)
    return paths


def logits_of(run_folder, images):
    loaded = load_model(run_folder)
    transform = eval_transform(input_config(loaded))
    with torch.inference_mode():
        return loaded.model(torch.stack([transform(read_image(path)) for path in images])), loaded.model


def test_evidence_sums_to_the_logits(analyze, run_folder, images, capsys):
    assert exit_code(analyze, ["evidence", str(run_folder), *map(str, images), "--batch-size", "2"]) == 0
    shown = capsys.readouterr().out
    folder = run_folder / "analysis"
    logits, model = logits_of(run_folder, images)
    top = logits.sort(dim=1, descending=True)
    arrays = np.load(folder / "evidence.npz")
    assert arrays["image"].tolist() == [str(path) for path in images]
    bias = model.head.fc.bias[top.indices[:, 0]].detach()
    found = torch.from_numpy(arrays["predicted"]).sum(dim=(1, 2)) + bias
    torch.testing.assert_close(found.float(), top.values[:, 0], rtol=0, atol=1e-5)
    rows = read_csv(folder / "evidence.csv")
    assert [float(row["probability"]) for row in rows] == pytest.approx(logits.softmax(1).amax(1).tolist())
    for row in rows:
        assert all(0 <= float(row[name]) <= 1 for name in ("deletion", "insertion", "random_deletion"))
    with Image.open(folder / "evidence.png") as picture:
        assert picture.width > 500
    assert "0.png" in shown
    assert f"\nwritten:\n{folder}/evidence.png\n" in shown
    assert "\x1b[31m" not in shown


def test_directions_sum_to_the_logits(analyze, run_folder, images, capsys):
    assert exit_code(analyze, ["directions", str(run_folder), *map(str, images)]) == 0
    folder = run_folder / "analysis"
    logits, _ = logits_of(run_folder, images)
    top = logits.sort(dim=1, descending=True).values
    rows = read_csv(folder / "directions.csv")
    for number, path in enumerate(images):
        own = [row for row in rows if row["image"] == str(path)]
        assert math.fsum(float(row["logit"]) for row in own) == pytest.approx(float(top[number, 0]), abs=1e-5)
        margin = float(top[number, 0] - top[number, 1])
        assert math.fsum(float(row["margin"]) for row in own) == pytest.approx(margin, abs=1e-5)
    assert {row["source"] for row in rows} >= {"down", "up", "right", "left", "mlp", "stem"}
    with Image.open(folder / "directions.png") as picture:
        assert picture.width > 500
    assert "logit above the runner-up" in capsys.readouterr().out


def test_a_folder_of_runs_stands_for_its_newest_run(analyze, run_folder, images, tmp_path, capsys):
    assert exit_code(analyze, ["directions", str(tmp_path), str(images[0])]) == 0
    assert (run_folder / "analysis" / "directions.csv").exists()
    assert capsys.readouterr().err == f"newest run in {tmp_path}: {run_folder}\n"


def test_an_unreadable_image_is_left_out(analyze, run_folder, images, tmp_path, capsys):
    images[0].write_text("no image")
    assert exit_code(analyze, ["evidence", str(run_folder), *map(str, images), "--output", str(tmp_path / "o")]) == 1
    assert len(read_csv(tmp_path / "o" / "evidence.csv")) == 2
    assert f"{images[0]} is left out: no image in one of the formats" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["evidence", "directions"])
def test_wrong_requests_leave_nothing(what, analyze, run_folder, images, tmp_path, capsys):
    images[0].write_text("no image")
    assert exit_code(analyze, [what, str(run_folder), str(images[0]), "--output", str(tmp_path / "o")]) == 2
    assert "error: no image can be read" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert exit_code(analyze, [what, str(tmp_path / "missing"), str(images[1])]) == 2
    assert "missing is neither a file or folder nor a timm model name" in capsys.readouterr().err
