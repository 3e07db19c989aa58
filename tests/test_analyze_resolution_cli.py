"""scripts/analyze.py resolution: table, picture, files, sizes that a model does not take, and exit codes."""

from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

from sequencer.evaluation import evaluate_model
from sequencer.models import load_model
from tests.helpers import DIGITS, exit_code, read_csv, save_run

NAMES = list("0123456789")
OPTIONS = ["--limit", "20", "--split", "val"]


def test_two_runs(analyze, tmp_path, capsys):
    runs = [save_run(tmp_path / f"run{seed}", DIGITS, NAMES, seed) for seed in (0, 1)]
    assert exit_code(analyze, ["resolution", *map(str, runs), "--split", "val", "--output", "both"]) == 0
    rows = read_csv(tmp_path / "both" / "resolution.csv")
    assert [(row["model"], int(row["size"])) for row in rows] == [
        (name, size) for name in ("run0", "run1") for size in (4, 6, 8, 10, 12, 16)
    ]
    assert [row["steps"] for row in rows[:6]] == ["2", "3", "4", "5", "6", "8"]
    own = [row for row in rows if row["size"] == "8"]
    for row in rows:
        size, model = int(row["size"]), load_model(runs[int(row["model"][-1])])
        result = evaluate_model(model, replace(DIGITS, img_size=size), "val")
        assert float(row["top1"]) == pytest.approx(result.metrics["top1"], abs=1e-6)
        assert float(row["images_per_s"]) > 0
        if row in own:
            assert row["change"] == ""
        else:
            clean = next(float(other["top1"]) for other in own if other["model"] == row["model"])
            assert float(row["change"]) == pytest.approx(float(row["top1"]) - clean)
            assert float(row["p_value"]) <= float(row["p_value_holm"]) <= 1
    states = read_csv(tmp_path / "both" / "resolution_states.csv")
    assert [(row["model"], row["size"], row["stage"], row["steps"]) for row in states] == [
        (row["model"], row["size"], "stages.0", row["steps"]) for row in rows
    ]
    assert all(float(row["state_rms"]) > 0 and 0 <= float(row["saturated"]) <= 1 for row in states)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "143 images of digits, val split"
    assert lines[1].split() == ["model", "size", "steps", "top-1", "change", "images/s"]
    assert lines[4].split()[:3] == ["run0", "8", "4"]
    assert "own size" in lines[4]
    files = [f"both/{name}" for name in ("resolution.png", "resolution.csv", "resolution_states.csv")]
    assert lines[-4:] == ["written:", *files]
    with Image.open(tmp_path / "both" / "resolution.png") as picture:
        assert picture.width > 1000
        assert picture.height > 1000


def test_a_size_that_the_model_does_not_take_is_a_gap(analyze, tmp_path, capsys):
    run = save_run(tmp_path / "run", DIGITS, NAMES)
    assert exit_code(analyze, ["resolution", str(run), "--sizes", "1,12", *OPTIONS]) == 0
    said = capsys.readouterr()
    message = "sequencer2d_t_8 takes no images of 1 px: input height 1 is smaller than the total stride 2"
    assert said.err == f"left out: {message}\n"
    assert said.out.splitlines()[2].split() == ["run", "1", "-", "-", "-", "-"]
    rows = read_csv(run / "analysis" / "resolution.csv")
    assert [(row["size"], row["top1"] != "") for row in rows] == [("1", False), ("8", True), ("12", True)]


def test_a_transformer_of_fixed_size(analyze, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), "vit.pth")
    request = ["resolution", "vit.pth", "--arch", "test_vit", "--data", "digits", "--limit", "4", "--sizes", "128,200"]
    assert exit_code(analyze, [*request, "--output", "o"]) == 0
    rows = read_csv(tmp_path / "o" / "resolution.csv")
    assert [(row["size"], row["steps"]) for row in rows] == [("128", ""), ("160", ""), ("200", "")]
    assert [row["top1"] != "" for row in rows] == [True, True, False]
    assert read_csv(tmp_path / "o" / "resolution_states.csv") == []
    message = "test_vit takes no images of 200 px: Input height (200) should be divisible by patch size (16)."
    assert capsys.readouterr().err == f"left out: {message}\n"


def test_wrong_requests_leave_nothing(analyze, tmp_path, capsys):
    run = str(save_run(tmp_path / "run", DIGITS, NAMES))
    output = ["--output", str(tmp_path / "o")]
    for arguments, message in (
        ([run, run], "error: the same MODEL is given twice\n"),
        ([run, "--sizes", "8,x"], "error: argument --sizes: x is not an integer\n"),
        ([run, "--sizes", "0"], "error: argument --sizes: 0 is less than 1\n"),
        (["resnet18"], "error: resnet18 is no file or folder; a timm model needs a data set, with --data NAME\n"),
    ):
        assert exit_code(analyze, ["resolution", *arguments, *output]) == 2
        assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "o").exists()


def test_a_model_that_refuses_its_own_size(analyze, tmp_path, capsys):
    run = str(save_run(tmp_path / "run", replace(DIGITS, img_size=8), NAMES, img_size=1))
    assert exit_code(analyze, ["resolution", run, "--output", str(tmp_path / "o"), *OPTIONS]) == 2
    assert "takes no images of 1 px: input height 1 is smaller than the total stride 2" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
