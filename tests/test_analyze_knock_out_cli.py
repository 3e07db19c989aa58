"""scripts/analyze.py knock-out: table, picture, file and exit codes."""

import pytest
import timm
import torch
from PIL import Image

from tests.helpers import DIGITS, exit_code, read_csv, save_run

NAMES = list("0123456789")


def test_knock_out(analyze, tmp_path, capsys):
    run = save_run(tmp_path / "run", DIGITS, NAMES)
    assert exit_code(analyze, ["knock-out", str(run), "--limit", "50", "--batch-size", "32", "--split", "test"]) == 0
    rows = read_csv(run / "analysis" / "knock-out.csv")
    assert [(row["stage"], row["block"], row["direction"]) for row in rows] == [
        ("0", "0", direction) for direction in ("down", "up", "right", "left")
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "50 images of digits, test split"
    assert lines[2].split() == ["change", "of", "top-1", "without", "down", "up", "right", "left"]
    clean = float(lines[1].split()[1].rstrip("%")) / 100
    for row in rows:
        wins, losses, change = int(row["wins"]), int(row["losses"]), float(row["change"])
        assert change == pytest.approx((wins - losses) / 50)
        assert float(row["top1"]) == pytest.approx(clean + change)
        assert float(row["change_low"]) <= change <= float(row["change_high"])
        assert float(row["top1_low"]) < float(row["top1"]) < float(row["top1_high"])
        assert 0 <= float(row["p_value"]) <= float(row["p_value_holm"]) <= 1
    assert lines[3].split()[:4] == ["stage", "0,", "block", "0"]
    assert lines[3].split()[4].rstrip("*") == f"{100 * float(rows[0]['change']):+.2f}"
    assert lines[-3:] == ["written:", *(f"{run}/analysis/knock-out.{suffix}" for suffix in ("png", "csv"))]
    with Image.open(run / "analysis" / "knock-out.png") as picture:
        assert picture.width > 500


def test_wrong_requests_leave_nothing(analyze, tmp_path, capsys):
    run = save_run(tmp_path / "run", DIGITS, NAMES)
    output = ["--output", str(tmp_path / "o")]
    torch.save(timm.create_model("test_resnet").state_dict(), "resnet.pth")
    request = ["knock-out", "resnet.pth", "--arch", "test_resnet", *output]
    assert exit_code(analyze, [*request, "--data", "digits"]) == 2
    message = "error: resnet.pth: knock-out is defined for Sequencer models, not for ResNet\n"
    assert capsys.readouterr().err == message
    assert exit_code(analyze, ["knock-out", "resnet18", *output]) == 2  # before weights are looked for
    message = "error: resnet18 is no file or folder; a timm model needs a data set, with --data NAME\n"
    assert capsys.readouterr().err == message
    two_classes = ["--data", "imagefolder", "--data-root", str(tmp_path)]
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "0.png")
    assert exit_code(analyze, ["knock-out", str(run), *two_classes, *output]) == 2
    assert capsys.readouterr().err == "error: the model has 10 classes, the data set 2\n"
    assert not (tmp_path / "o").exists()
