"""scripts/analyze.py symmetry: table, picture, file and exit codes."""

import pytest
from PIL import Image

from tests.helpers import DIGITS, exit_code, read_csv, save_run

NAMES = list("0123456789")


def test_two_models(analyze, tmp_path, capsys):
    runs = [str(save_run(tmp_path / f"run{seed}", DIGITS, NAMES, seed)) for seed in (0, 1)]
    options = ["--limit", "20", "--split", "val"]
    assert exit_code(analyze, ["symmetry", *runs, *options, "--output", "both"]) == 0
    rows = read_csv(tmp_path / "both" / "symmetry.csv")
    assert len(rows) == 2 * 36
    clean = {row["model"]: float(row["top1"]) for row in rows if row["condition"] == "unchanged"}
    assert list(clean) == ["run0", "run1"]
    for row in rows:
        if row["condition"] != "unchanged":
            assert float(row["top1"]) == pytest.approx(clean[row["model"]] + float(row["change"]))
            assert float(row["change"]) == pytest.approx((int(row["wins"]) - int(row["losses"])) / 20)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "20 images of digits, val split"
    assert lines[2].split() == ["unchanged", *(f"{value:.2%}" for value in clean.values())]
    assert lines[3].split()[:2] == ["horizontal", "flip"]
    assert lines[-3:] == ["written:", "both/symmetry.png", "both/symmetry.csv"]
    with Image.open(tmp_path / "both" / "symmetry.png") as picture:
        assert picture.width > 1000

    assert exit_code(analyze, ["symmetry", runs[0], *options, "--batch-size", "7"]) == 0
    assert read_csv(tmp_path / "run0" / "analysis" / "symmetry.csv") == rows[:36]


def test_wrong_requests_leave_nothing(analyze, tmp_path, capsys):
    run = str(save_run(tmp_path / "run", DIGITS, NAMES))
    output = ["--output", str(tmp_path / "o")]
    assert exit_code(analyze, ["symmetry", run, run, *output]) == 2
    assert capsys.readouterr().err == "error: the same MODEL is given twice\n"
    assert exit_code(analyze, ["symmetry", run, "--limit", "0", *output]) == 2
    assert "0 is less than 1" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
