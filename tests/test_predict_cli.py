"""scripts/predict.py: output, files and exit codes."""

import csv
import glob
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from sequencer.data import eval_transform, read_image
from sequencer.evaluation import input_config, prediction, readable_names
from sequencer.export import export_graph
from sequencer.models import load_model
from tests.helpers import DIGITS, SCRIPTS, exit_code, save_run

NAMES = [f"class {k}" for k in range(10)]
NO_IMAGE = "no image in one of the formats JPEG, PNG, WEBP, PPM, BMP, TIFF, GIF"


@pytest.fixture
def script(load_script):
    return load_script("predict")


@pytest.fixture
def run_folder(tmp_path):
    return save_run(tmp_path / "run", DIGITS, NAMES)


def noise(path: Path, seed: int, size: tuple[int, int] = (11, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(256, size=(*size, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def images(tmp_path) -> list[Path]:
    """Seven images of several sizes and formats in nested folders, and a file that is no image."""
    names = ["a/1.png", "a/2.JPG", "a/deep/3.bmp", "b/4.png", "b/5.webp", "b/6.jpeg", "b/7.tif"]
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "notes.txt").write_text("none")
    return [noise(tmp_path / "set" / name, seed, (8 + seed, 10)) for seed, name in enumerate(names)]


def expected(run_folder: Path, images: list[Path]) -> torch.Tensor:
    """Probabilities `N K`, computed image by image."""
    loaded = load_model(run_folder)
    transform = eval_transform(input_config(loaded))
    with torch.inference_mode():
        return torch.cat([loaded.model(transform(read_image(path)).unsqueeze(0)) for path in images]).softmax(1)


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines(script, run_folder, images, capsys):
    arguments = [str(run_folder), "set", "--format", "jsonl", "--top", "3", "--batch-size", "2", "--device", "cpu"]
    assert script.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = lines(printed.out)
    assert [Path(row["path"]).name for row in found] == [path.name for path in images]  # a folder's files, then deeper
    for row, probabilities in zip(found, expected(run_folder, images), strict=True):
        values, classes = probabilities.topk(3)
        assert [one["class"] for one in row["classes"]] == [NAMES[k] for k in classes]
        assert [one["probability"] for one in row["classes"]] == pytest.approx(values.tolist(), abs=1e-6)


def test_csv(script, run_folder, images, capsys):
    assert script.main([str(run_folder), str(images[0]), "nothing.png", "--format", "csv", "--top", "2"]) == 1
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert list(rows[0]) == ["path", "class", "probability", "class_2", "probability_2", "error"]
    best = expected(run_folder, images[:1])[0]
    assert rows[0]["class"] == NAMES[best.argmax()]
    assert float(rows[0]["probability"]) == pytest.approx(best.max().item(), abs=1e-6)
    assert rows[1] == dict.fromkeys(rows[0], "") | {"path": "nothing.png", "error": "No such file or directory"}
    assert printed.err == "1 of 2 images could not be read\n"


def test_table(script, run_folder, images, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    assert script.main([str(run_folder), str(images[0]), "bad.png", str(images[1])]) == 1
    best = expected(run_folder, images[:1])[0]
    printed = capsys.readouterr()
    table = printed.out.splitlines()
    assert table[0].split() == [str(images[0]), *NAMES[best.argmax()].split(), f"{best.max():.2%}"]
    assert table[1].split(maxsplit=1) == [
        "bad.png",
        "cannot be read: no image in one of the formats JPEG, PNG, WEBP, PPM, BMP, TIFF, GIF",
    ]
    assert table[0].index("class") == table[1].index("cannot") == table[2].index("class")


def test_paths_patterns_and_a_list(script, run_folder, images, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("set/b/4.png\n\nset/a/1.png\n"))
    assert script.main([str(run_folder), "set/**/*.bmp", "-", "set/b", "--format", "jsonl"]) == 0
    found = [row["path"] for row in lines(capsys.readouterr().out)]
    assert found == [
        "set/a/deep/3.bmp",
        "set/b/4.png",
        "set/a/1.png",
        *(str(Path("set/b") / p.name) for p in images[3:]),
    ]


def test_what_is_no_image_file_is_an_error_of_its_line(script, run_folder, images, tmp_path, capsys, monkeypatch):
    os.mkfifo(tmp_path / "set" / "a" / "fifo.png")
    (tmp_path / "set" / "a" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "eps.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    Image.new("1", (1, 10**6)).save(tmp_path / "thin.png")
    arguments = ["set/a", "set/a/fifo.png", "/dev/zero", "set/**/zero.png", "eps.jpg", "thin.png", "-"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\0.png\n"))
    assert script.main([str(run_folder), *arguments, "--format", "jsonl"]) == 1
    rows = lines(capsys.readouterr().out)
    reasons = [(Path(row["path"]).name, row.get("error", "")) for row in rows]
    special = "a device, FIFO or socket, no regular file"
    assert [name for name, reason in reasons if reason == special] == [
        *("fifo.png", "zero.png"),
        *("fifo.png", "zero", "zero.png"),
    ]
    assert [name for name, reason in reasons if not reason] == ["1.png", "2.JPG", "3.bmp", "thin.png"]
    assert dict(reasons)["eps.jpg"].startswith("no image in one of the formats")
    assert dict(reasons)["\0.png"] == "embedded null byte"


def test_memory_of_a_thin_image_is_bounded(load_script, tmp_path, capsys):
    large = replace(DIGITS, img_size=224, crop_pct=0.875)
    run_folder = save_run(tmp_path / "run", large, NAMES)
    Image.new("1", (60_000, 1)).save(tmp_path / "thin.png")
    assert load_script("predict").main([str(run_folder), "thin.png"]) == 1
    assert "resizing it to 256 pixels takes more than 1536 MiB" in capsys.readouterr().out


def test_a_cycle_of_links_repeats_no_image(script, run_folder, images, tmp_path, capsys):
    """With two links a pattern would match 2**40 paths."""
    for name, target in (("loop", "."), ("back", ".."), ("self", "self")):
        (tmp_path / "set" / "a" / name).symlink_to(target)
    (tmp_path / "set" / "b" / "outside").symlink_to(noise(tmp_path / "other" / "8.png", 8).parent)
    noise(tmp_path / "set" / ".hidden" / "9.png", 9)
    found = []
    for pattern in ("set", "set/**/*.*", "**/*.*", "./set/**/*.*", "**/a/**/*.*", str(tmp_path / "set" / "**" / "*.*")):
        script.main([str(run_folder), pattern, "--format", "jsonl"])
        found.append([Path(row["path"]).name for row in lines(capsys.readouterr().out)])
    below = sorted(["1.png", "2.JPG", "3.bmp", "4.png", "5.webp", "6.jpeg", "7.tif", "8.png", "notes.txt"])
    assert sorted(set(found[0])) == sorted({*below, "9.png"} - {"8.png", "notes.txt"})
    assert len(found[0]) == 8
    assert sorted(found[1]) == sorted(found[3]) == sorted(found[5]) == below
    assert [found[2].count(name) for name in ("1.png", "4.png", "8.png")] == [1, 1, 1]
    assert sorted(found[4]) == ["1.png", "2.JPG", "3.bmp", "notes.txt"]


def test_a_pattern_matches_what_it_matches_in_a_shell(images, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for pattern in ("set/**/*.bmp", "set/**", "**/*.png", "*/**/[0-9].*", "set/**/deep/*", "set/*/*.png", "./**/3.bmp"):
        expected = {path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)}
        assert {path for path in prediction.find_images([pattern]) if not os.path.isdir(path)} == expected


def test_names_are_shown_escaped(script, images, tmp_path, monkeypatch, capsys):
    """Of files and classes: escape sequences, newlines and bytes that are not UTF-8."""
    classes = ["red\x1b[31m", "two\nlines", os.fsdecode(b"caf\xe9"), *NAMES[3:]]
    run_folder = save_run(tmp_path / "run", DIGITS, classes)
    folder = tmp_path / os.fsdecode(b"odd\xff\n\x1b[2J")
    noise(folder / "a\nb.png", 1)
    (folder / "c\x1b.png").write_text("no image")
    shown = r"odd\xff\n\x1b[2J"
    for kind, count in (("table", 4), ("csv", 5)):
        names = io.BytesIO(b"set/a/1.png\nno\xff\x1b.png\n")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(names, "utf-8"))
        arguments = [str(run_folder), os.path.relpath(folder, tmp_path), "-", "--format", kind, "--top", "10"]
        assert script.main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.err == "2 of 4 images could not be read\n"
        printed.out.encode("utf-8")
        assert len(printed.out.splitlines()) == count
        assert not set(printed.out) & {"\x1b", "\r"}
        for name in (rf"{shown}/a\nb.png", rf"{shown}/c\x1b.png", r"no\xff\x1b.png"):
            assert f"\n{name}" in f"\n{printed.out}"
        for name in (r"red\x1b[31m", r"two\nlines", r"caf\xe9"):
            assert name in printed.out


def test_errors_show_names_escaped(script, run_folder, capsys):
    for arguments in (
        ["no\x1b[2J\nmodel", "a.png"],
        [str(run_folder), "a.png", "--output", os.fsdecode(b"\xff\x1b/x/\0")],
    ):
        assert exit_code(script, arguments) in (1, 2)
        printed = capsys.readouterr().err
        assert "\x1b" not in printed
        printed.encode("utf-8")


def test_sources_without_images(script, run_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert script.main([str(run_folder), "empty", "no*.png", "--format", "jsonl"]) == 1
    reasons = {row["path"]: row["error"] for row in lines(capsys.readouterr().out)}
    assert reasons == {"empty": "a folder without images", "no*.png": "matches no file"}


@pytest.mark.parametrize(
    ("name", "start"), [("out.csv", "path,class,"), ("out.jsonl", '{"path"'), ("out.txt", "set/a/1")]
)
def test_output(script, run_folder, images, capsys, name, start):
    assert script.main([str(run_folder), "set", "--output", f"new/{name}"]) == 0
    assert Path("new", name).read_text().startswith(start)
    assert [path.name for path in Path("new").iterdir()] == [name]
    assert capsys.readouterr() == ("", f"written: new/{name}\n")


def test_a_json_file_is_one_array(script, run_folder, images, tmp_path, monkeypatch):
    (tmp_path / "bad.png").write_text("no image")
    assert script.main([str(run_folder), str(images[0]), "bad.png", "--output", "out.JSON"]) == 1
    first, second = json.loads(Path("out.JSON").read_text())
    assert first["path"] == str(images[0])
    assert first["classes"][0]["class"] in NAMES
    assert second == {"path": "bad.png", "error": NO_IMAGE}
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert script.main([str(run_folder), "-", "--output", "none.json"]) == 0
    assert json.loads(Path("none.json").read_text()) == []


def test_a_parquet_file(script, run_folder, images, tmp_path, monkeypatch):
    (tmp_path / "bad.png").write_text("no image")
    monkeypatch.setattr(script, "ROW_GROUP", 3)
    assert script.main([str(run_folder), "set", "bad.png", "--top", "2", "--output", "out.parquet"]) == 1
    table = pyarrow.parquet.read_table("out.parquet")
    assert table.column_names == ["path", "class", "probability", "class_2", "probability_2", "error"]
    assert [str(kind) for kind in table.schema.types] == ["string", *["string", "double"] * 2, "string"]
    rows = table.to_pylist()
    for row, path, probabilities in zip(rows, images, expected(run_folder, images), strict=False):
        assert (row["path"], row["error"]) == (os.path.relpath(path, tmp_path), None)
        assert row["class"] == NAMES[probabilities.argmax()]
        assert row["probability"] == pytest.approx(probabilities.max().item(), abs=1e-6)
    assert len(rows) == 8
    assert rows[-1] == dict.fromkeys(rows[0]) | {"path": "bad.png", "error": NO_IMAGE}


def test_parquet_without_pyarrow(script, run_folder, images, capsys, monkeypatch):
    monkeypatch.setattr("_cli.find_spec", lambda name: None)
    assert script.main([str(run_folder), "set", "--output", "out.parquet"]) == 2
    assert capsys.readouterr().err == "error: Parquet needs pyarrow: python -m pip install pyarrow\n"
    assert not Path("out.parquet").exists()


def test_a_failure_leaves_the_old_output(script, run_folder, images, monkeypatch, capsys):
    Path("out.csv").write_text("old")

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(prediction, "_classify", fail)
    assert script.main([str(run_folder), "set", "--output", "out.csv"]) == 1
    assert "error: out of memory" in capsys.readouterr().err
    assert Path("out.csv").read_text() == "old"
    assert not list(Path().glob(".out*"))


def test_an_export_predicts_as_its_run(script, run_folder, images, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    export_graph(load_model(run_folder), tmp_path, "onnx", 8)
    found = []
    for model in (run_folder, run_folder / "model", tmp_path / "model.onnx"):
        assert script.main([str(model), "set", "--format", "jsonl"]) == 0
        found.append(lines(capsys.readouterr().out))
    for row, *others in zip(*found, strict=True):
        for other in others:
            assert other["classes"][0]["class"] == row["classes"][0]["class"]
            assert other["classes"][0]["probability"] == pytest.approx(row["classes"][0]["probability"], abs=1e-5)


def test_a_nan_output_is_an_error(script, run_folder, images, monkeypatch, capsys):
    loaded = load_model(run_folder)
    torch.nn.init.constant_(loaded.model.get_classifier().bias, torch.nan)
    monkeypatch.setattr(script, "load", lambda *args: loaded)
    assert script.main([str(run_folder), str(images[0]), "--format", "jsonl"]) == 1
    assert lines(capsys.readouterr().out)[0]["error"] == "the model's output is not finite"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "set"], "nowhere is neither a file or folder nor a timm model name"),
        (["set", "set"], "set is neither a run nor a model folder"),
        (["RUN"], "the following arguments are required: PATHS\n"),
        (["set/a"], "the following arguments are required: PATHS; MODEL is missing before set/a\n"),
        (["set/a/1.png"], "the following arguments are required: PATHS; MODEL is missing before set/a/1.png\n"),
        (["RUN", "set", "--top", "0"], "--top: 0 is less than 1"),
        (["RUN", "set", "--output", "set.csv"], "--output set.csv is no regular file; name a file, or leave it out"),
        (["RUN", "set", "--output", "out.xlsx"], "--output out.xlsx: its suffix is none of .csv, .json, .jsonl, "),
        (["RUN", "set", "--output", "out"], "add --format, or another suffix"),
        (["RUN", "set", "--output", "a.json", "--format", "csv"], "files with this suffix hold json, and --format is"),
        (["RUN", "set", "--format", "parquet"], "--format parquet needs --output FILE.parquet"),
        (["RUN", "set", "--output", "set/a/1.png/out.csv"], "set/a/1.png cannot be written: File exists"),
        (["RUN/model/config.json", "set"], "config.json"),
    ],
)
def test_wrong_requests(script, run_folder, images, capsys, arguments, message):
    Path("set.csv").mkdir()
    (run_folder / "confusion.png").touch()
    arguments = [argument.replace("RUN", str(run_folder)) for argument in arguments]
    assert exit_code(script, arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) <= 2
    assert printed.out == ""


def test_a_closed_pipe_is_no_error(run_folder, images, tmp_path):
    command = f"{sys.executable} {SCRIPTS / 'predict.py'} {run_folder} - --batch-size 1 < list.txt | head -n 1"
    (tmp_path / "list.txt").write_text(f"{images[0]}\n" * 1000)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


def test_names_of_imagenet():
    assert readable_names(("n01440764", "mine"), 2) == ["tench, Tinca tinca", "mine"]
    assert readable_names(None, 1000)[281] == "tabby, tabby cat"
    assert readable_names(None, 3) == ["0", "1", "2"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(run_folder, images, tmp_path):
    """100,000 images need at most 16 MiB more than 10,000; keeping their pixels would need about 60 MiB."""
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for number in (10_000, 100_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        for index in range(number):
            (folder / f"{index}.png").hardlink_to(images[index % 2])
        command = [sys.executable, "-c", code, str(SCRIPTS / "predict.py"), str(run_folder), str(folder)]
        command += ["--output", str(tmp_path / "out.csv")]
        env = {"PYTHONPATH": str(SCRIPTS), "PATH": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert len((tmp_path / "out.csv").read_text().splitlines()) == number + 1
        peaks.append(int(done.stderr.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 16 * 1024, peaks
