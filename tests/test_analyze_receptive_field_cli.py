"""scripts/analyze.py receptive-field: table, picture, files and exit codes."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers import DIGITS, exit_code, read_csv, save_run

NAMES = [f"class {k}" for k in range(10)]


@pytest.fixture
def runs(tmp_path):
    return [str(save_run(tmp_path / name, DIGITS, NAMES, seed)) for seed, name in enumerate(("one", "two"))]


def test_two_models_on_noise(analyze, runs, tmp_path, capsys):
    output = tmp_path / "out"
    common = ["receptive-field", *runs, "--noise", "5", "--output"]
    assert exit_code(analyze, [*common, str(output), "--batch-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("preset sequencer, 5 images of noise\nmodel")
    rows = read_csv(output / "receptive-field.csv")
    assert [(row["model"], row["stage"], row["token_row"]) for row in rows] == [
        ("one", "stages.0", "1"),
        ("two", "stages.0", "1"),
    ]
    arrays = np.load(output / "receptive-field.npz")
    assert arrays["one/stages.0"].shape == (8, 8)
    assert (arrays["one/stages.0"] > 0).any()
    assert not (arrays["one/stages.0"] == arrays["two/stages.0"]).all()
    with Image.open(output / "receptive-field.png") as picture:
        assert picture.width > 500
    assert exit_code(analyze, [*common, str(tmp_path / "again")]) == 0
    again = np.load(tmp_path / "again" / "receptive-field.npz")
    np.testing.assert_allclose(arrays["two/stages.0"], again["two/stages.0"], rtol=1e-4, atol=1e-7)


def test_images_of_files(analyze, runs, tmp_path, capsys):
    Image.fromarray(np.random.RandomState(0).randint(256, size=(9, 11), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    arguments = ["receptive-field", *runs, "--preset", "replknet", "--images"]
    assert exit_code(analyze, [*arguments, str(tmp_path / "a.png"), str(tmp_path / "b.png")]) == 1
    output = capsys.readouterr()
    assert output.out.startswith("preset replknet, 1 image\n")
    assert output.err.count("b.png is left out: no image in one of the formats") == 1
    rows = read_csv(tmp_path / "outputs" / "analysis" / "receptive-field.csv")
    assert [row["token_row"] for row in rows] == ["2", "2"]


def test_wrong_requests(analyze, runs, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert exit_code(analyze, ["receptive-field", *runs, *output]) == 2
    assert "error: one of the arguments --images --noise is required\n" in capsys.readouterr().err
    assert exit_code(analyze, ["receptive-field", *runs, "--noise", "1", "--images", "a.png", *output]) == 2
    assert "not allowed with argument --noise" in capsys.readouterr().err
    assert exit_code(analyze, ["receptive-field", runs[0], runs[0], "--noise", "1", *output]) == 2
    assert capsys.readouterr().err == "error: the same MODEL is given twice\n"
    (tmp_path / "b.png").write_text("no image")
    assert exit_code(analyze, ["receptive-field", *runs, "--images", str(tmp_path / "b.png"), *output]) == 2
    assert "error: no image can be read\n" in capsys.readouterr().err
    assert exit_code(analyze, ["receptive-field", runs[0], "missing", "--noise", "1", *output]) == 2
    assert "missing is neither a file or folder nor a timm model name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
