"""Outputs of the scripts that cannot be written: two lines that name the file, and nothing is left."""

import fcntl
import os

import numpy as np
import pytest
from PIL import Image

import sequencer.measure  # noqa: F401 - compiled here, not below the calls of a test
from sequencer.files import WriteError, write_json
from tests.helpers import DIGITS, exit_code, fill, save_run


@pytest.fixture
def photos(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "photos" / split / "cat" / "0.png")
    return tmp_path / "photos"


COMMANDS = {  # script and format: the file, and the arguments before --output
    "export onnx": ("model.onnx", ["RUN", "--format", "onnx"]),
    "export torch_export": ("model.pt2", ["RUN", "--format", "torch_export"]),
    "export hub": ("model.safetensors", ["RUN", "--format", "hub"]),
    "export timm": ("model.safetensors", ["RUN", "--format", "timm"]),
    "export paper": ("model.pth", ["RUN", "--format", "paper"]),
    "average": ("model.safetensors", ["RUN", "RUN"]),
    "evaluate": ("predictions.csv", ["RUN"]),
    "predict": ("", ["RUN", "PHOTOS/val", "--format", "csv"]),
    "shards": ("train-000000.tar", ["write", "PHOTOS"]),
    "benchmark": (
        "benchmark.json",
        ["ops", "--batch", "1", "--rounds", "2", "--mode", "inference", "--backend", "torch"],
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_reported_in_two_lines_and_nothing_is_left(
    command, small_disk, tmp_path, photos, load_script, capsys, monkeypatch
):
    name, arguments = COMMANDS[command]
    if command == "shards":
        pytest.importorskip("webdataset")
    if command == "export onnx":
        pytest.importorskip("onnxscript")
    if command == "benchmark":  # the product and the copy that rates are measured with take seconds
        monkeypatch.setattr("sequencer.measure.peak_rates", lambda device, dtype: (1e9, 1e9))
    run = save_run(tmp_path / "run", DIGITS, list("0123456789"))
    arguments = [text.replace("RUN", str(run)).replace("PHOTOS", str(photos)) for text in arguments]
    fill(small_disk)
    output = small_disk / "new" / "folder"
    assert exit_code(load_script(command.split()[0]), [*arguments, "--output", str(output)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {output / name} could not be written: ")
    assert "No space left on device" in first
    assert second == "add --debug for the traceback"
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_shards_are_replaced_together(load_script, photos, tmp_path, capsys):
    pytest.importorskip("webdataset")
    script, output = load_script("shards"), tmp_path / "out"
    assert script.main(["write", str(photos), "--output", str(output)]) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    Image.fromarray(np.ones((9, 9), np.uint8)).save(photos / "train" / "cat" / "1.png")
    (photos / "val" / "cat" / "0.png").unlink()
    (photos / "val" / "cat" / "0.png").symlink_to("/proc/self/mem")  # a regular file that cannot be read
    assert script.main(["write", str(photos), "--output", str(output)]) == 2
    assert capsys.readouterr().err == f"error: {photos}/val/cat/0.png: Input/output error\n"
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_device_or_fifo_is_not_replaced(load_script, tmp_path, photos, capsys):
    os.mkfifo(tmp_path / "fifo.csv")
    with pytest.raises(WriteError, match="a device, FIFO or socket, no regular file"):
        write_json(tmp_path / "fifo.csv", 1)
    assert (tmp_path / "fifo.csv").is_fifo()
    run = save_run(tmp_path / "run", DIGITS, list("0123456789"))
    assert load_script("predict").main([str(run), str(photos), "--output", str(tmp_path / "fifo.csv")]) == 2
    assert capsys.readouterr().err == (
        f"error: --output {tmp_path}/fifo.csv is no regular file; name a file, or leave it out to print\n"
    )
    assert (tmp_path / "fifo.csv").is_fifo()


def test_the_target_of_a_link_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to("disk/record.json")
    for content in (1, 2):
        write_json(tmp_path / "link.json", content)
        assert (tmp_path / "link.json").is_symlink()
        assert (tmp_path / "disk" / "record.json").read_text() == f"{content}\n"


def test_two_processes_do_not_write_one_file(tmp_path):
    with open(tmp_path / ".record.json.partial", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(WriteError, match=r"record.json could not be written: another process is writing it"):
            write_json(tmp_path / "record.json", 1)
        assert (tmp_path / ".record.json.partial").exists()
    write_json(tmp_path / "record.json", 1)  # what a killed process has left does not matter
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
