"""scripts/analyze.py memory: the table, the files and wrong requests."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers import DIGITS, exit_code, read_csv, save_run

NAMES = [f"class {k}" for k in range(10)]


@pytest.fixture
def run_folder(tmp_path):
    return save_run(tmp_path / "run", DIGITS, NAMES, seed=1)


def test_a_run_beside_its_untrained_architecture(analyze, run_folder, tmp_path, capsys):
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.RandomState(seed).randint(256, size=(9, 11, 3), dtype=np.uint8)).save(path)
    paths[1].write_text("no image")
    arguments = ["memory", str(run_folder), "--untrained", "--batch-size", "1", "--images", *map(str, paths)]
    assert exit_code(analyze, arguments) == 1  # an image is unreadable
    said = capsys.readouterr()
    assert said.err == f"{paths[1]} is left out: no image in one of the formats JPEG, PNG, WEBP, PPM, BMP, TIFF, GIF\n"
    folder = run_folder / "analysis"
    rows = read_csv(folder / "memory.csv")
    assert {row["model"] for row in rows} == {"run", "run, untrained"}
    trained, fresh = ([row for row in rows if row["model"] == name] for name in ("run", "run, untrained"))
    assert len(trained) == len(fresh) == 4 * 4  # four directions of four steps
    assert [row["distance"] for row in trained[:4]] == ["0", "1", "2", "3"]
    assert trained[0]["jacobian_norm"] != fresh[0]["jacobian_norm"]
    assert trained[0]["forget_product"] == "1.0"
    scans = read_csv(folder / "memory_scans.csv")
    assert [row["gate"] for row in scans[:3]] == ["input", "forget", "output"]
    maps = np.load(folder / "memory.npz")
    assert maps["run/stages.0.blocks.0.rnn_tokens/0/up/forget"].shape == (4, 4)
    for name in ("memory.png", "memory_maps.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 500
    lines = said.out.splitlines()
    assert lines[0].split()[:4] == ["model", "steps", "half-distance", "from"]
    assert lines[1].startswith("run ")
    assert lines[2].startswith("run, untrained ")
    assert f"\nwritten:\n{folder}/memory.png\n" in said.out


def test_cells_of_one_architecture(analyze, tmp_path, capsys):
    arguments = ["memory", "sequencer2d_t_8", "--cells", "rnn,lstm1997", "--noise", "2", "--img-size", "12"]
    assert exit_code(analyze, [*arguments, "--output", str(tmp_path / "o")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert [row[:2] for row in rows] == [["rnn", "12"], ["rnn", "6"], ["lstm1997", "12"], ["lstm1997", "6"]]
    left = {row["model"]: float(row["jacobian_norm"]) for row in read_csv(tmp_path / "o" / "memory.csv")[11::12]}
    assert left["rnn"] < left["lstm1997"]
    assert {row["forget_product"] for row in read_csv(tmp_path / "o" / "memory.csv")} == {"", "1.0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sequencer2d_t_8", "--cells", "lsmt"], "--cells: unknown cell lsmt; there are lstm, gru, rnn,"),
        (["resnet18", "--cells", "lstm"], "resnet18 has no cells to choose: --cells needs a Sequencer"),
        (["sequencer2d_t_8", "--cells", "lstm", "--untrained"], "--untrained: with --cells every model is untrained"),
        (["sequencer2d_t_8"] * 2 + ["--cells", "lstm"], "the same MODEL is given twice"),
        (["missing"], "missing is neither a file or folder nor a timm model name"),
    ],
)
def test_wrong_requests_leave_nothing(arguments, message, analyze, tmp_path, capsys):
    output = ["--output", str(tmp_path / "o")]
    assert exit_code(analyze, ["memory", *arguments, "--noise", "1", *output]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_unreadable_images_are_no_fault_of_the_model(analyze, run_folder, tmp_path, capsys):
    (tmp_path / "a.png").write_text("no image")
    assert exit_code(analyze, ["memory", str(run_folder), "--images", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err.endswith("\nerror: no image can be read\n")


def test_images_or_noise_are_required(analyze, run_folder, capsys):
    assert exit_code(analyze, ["memory", str(run_folder)]) == 2
    assert "one of the arguments --images --noise is required" in capsys.readouterr().err
