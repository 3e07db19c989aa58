"""Image files of every kind that goes wrong, in a set, in training, in evaluation."""

import csv
import dataclasses
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sequencer.config.schema import AugmentConfig, DataConfig
from sequencer.data import DataModule, Quarantine, TooManyBadImages, check_images
from sequencer.data.images import UnreadableImage, read_image
from sequencer.data.quarantine import COLUMNS

TRAIN = Path(__file__).parents[2] / "train.py"
CLASSES = ("ants", "bees")
MODEL = "model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}"


def photograph(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def truncated(folder: Path) -> Path:
    path = photograph(folder / "truncated.jpg", size=(200, 200))
    path.write_bytes(path.read_bytes()[:3000])
    return path


def text(folder: Path) -> Path:
    path = folder / "text.png"
    path.write_text("not an image")
    return path


def nothing(folder: Path) -> Path:
    path = folder / "zero.jpg"
    path.touch()
    return path


def bomb(folder: Path) -> Path:
    path = folder / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(path)
    return path


def broken_png(folder: Path) -> Path:
    path = photograph(folder / "broken.png", size=(100, 100))
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(bytes(content))
    return path


BAD = [truncated, text, nothing, bomb, broken_png]


@pytest.mark.parametrize("make", BAD)
def test_what_cannot_be_read_is_one_error(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(UnreadableImage) as error:
        read_image(path)
    assert error.value.path == str(path)
    assert error.value.reason
    assert "\n" not in error.value.reason


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "gone.jpg")


def test_odd_images_are_read(tmp_path):
    colour = (200, 100, 50)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("RGBA", (4, 4), (*colour, 0)).save(tmp_path / "transparent.png")
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *colour])
    palette.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    frames = [Image.new("RGB", (4, 4), c) for c in (colour, (0, 0, 0))]
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "animated.png", save_all=True, append_images=frames[1:])
    for name in ("transparent.png", "palette.png", "animated.webp", "animated.png"):
        image = read_image(tmp_path / name)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 4), colour)
    assert read_image(tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)
    red, green, blue = read_image(tmp_path / "cmyk.jpg").getpixel((0, 0))
    assert red > 200 > 60 > max(green, blue)


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    values = np.array([[0, 255, 256], [32768, 40000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values).save(tmp_path / "grey.tif")
    (tmp_path / "grey.pgm").write_bytes(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
    for name in ("grey.png", "grey.tif", "grey.pgm"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name))[..., 0], values >> 8)


def test_a_large_image_is_read_without_a_warning(tmp_path):
    Image.new("L", (30_000, 3_100), 9).save(tmp_path / "large.png")  # 93 million pixels: Pillow warns from 89 on
    assert read_image(tmp_path / "large.png").size == (30_000, 3_100)


@pytest.fixture
def root(tmp_path):
    """Two classes with 12 images each to train and 6 to validate, and of each part two that cannot be read."""
    for part, images in (("train", 12), ("val", 6)):
        for number in range(2 * images):
            photograph(tmp_path / "set" / part / CLASSES[number % 2] / f"{number:02}.png", seed=number)
        text(tmp_path / "set" / part / "ants")
        nothing(tmp_path / "set" / part / "bees")
    return tmp_path / "set"


def config(root: Path, workers: int = 0, share: float = 0.5) -> DataConfig:
    return DataConfig(
        name="imagefolder",
        root=str(root),
        img_size=16,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        batch_size=13,
        eval_batch_size=1,
        num_workers=workers,
        max_bad_share=share,
        augment=AugmentConfig(hflip=0.5),
    )


def listed(path: Path) -> list[tuple[str, str]]:
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return sorted((row["part"], Path(row["path"]).name) for row in reader)


def module(config: DataConfig, path: Path) -> DataModule:
    data = DataModule(config, 0, bad_samples=path)
    data.setup()
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_training_takes_another_image_and_evaluation_none(root, tmp_path, workers):
    path = tmp_path / "run" / "bad_samples.csv"
    data = module(config(root, workers), path)
    epochs = [[images for images, _ in data.train_dataloader()] for _ in range(2)]
    assert [len(batch) for batch in epochs[0]] == [13, 13]
    assert all(torch.equal(a, b) for a, b in zip(*epochs, strict=True))  # a function of seed, epoch and index still
    assert sum(len(labels) for _, labels, _ in data.val_dataloader()) == 12
    bad = [(part, name) for part in ("train", "val") for name in ("text.png", "zero.jpg")]
    assert listed(path) == bad
    module(config(root, workers), path)
    assert sum(len(labels) for _, labels, _ in data.val_dataloader()) == 12
    assert listed(path) == bad  # each once, whoever finds it again


def test_workers_change_nothing(root, tmp_path):
    alone, helped = (module(config(root, workers), tmp_path / f"{workers}.csv") for workers in (0, 2))
    for a, b in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_a_file_that_vanishes_between_two_batches(root, tmp_path):
    data = module(config(root), tmp_path / "bad.csv")
    batches = iter(data.train_dataloader())
    next(batches)
    for path in (root / "train" / "ants").glob("*.png"):
        path.unlink()
    assert len(next(batches)[0]) == 13
    with open(tmp_path / "bad.csv", newline="") as file:
        assert "No such file or directory" in {row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_are_an_error(root, tmp_path, workers):
    data = module(config(root, workers, share=0.05), tmp_path / "bad.csv")
    with pytest.raises(
        TooManyBadImages, match=r"2 of 26 train images cannot be read, more than data\.max_bad_share=0\.05"
    ):
        list(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_check(root, tmp_path, workers):
    data = module(config(root, workers), tmp_path / "bad.csv")
    assert check_images("imagefolder", data.parts, workers, show_progress=False) == 36
    assert len(listed(tmp_path / "bad.csv")) == 4
    assert check_images("digits", data.parts, workers, show_progress=False) == 40  # nothing to decode there


def report(path: Path, start) -> None:
    quarantine = Quarantine(path, "train", 1000, 1.0)
    start.wait()
    for number in range(50):
        quarantine.report(UnreadableImage(f"{number}.jpg", 'a, "b"'))


def test_several_processes_write_one_list(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [context.Process(target=report, args=(tmp_path / "bad.csv", start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert listed(tmp_path / "bad.csv") == sorted(("train", f"{number}.jpg") for number in range(50))


def test_a_line_torn_by_a_kill(tmp_path):
    path = tmp_path / "bad.csv"
    quarantine = Quarantine(path, "train", 10, 1.0)
    quarantine.report(UnreadableImage("a.jpg", "one"))
    path.write_text(path.read_text() + "train,b.j")
    quarantine.report(UnreadableImage("b.jpg", "two"))
    quarantine.report(UnreadableImage("a.jpg", "one"))
    lines = path.read_text().splitlines()
    assert lines == ["part,path,reason", "train,a.jpg,one", "train,b.j", "train,b.jpg,two"]


def command(root: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(TRAIN), "data=imagefolder", f"data.root={root}", "data.img_size=16", MODEL,
            "model.name=sequencer2d_t_8", "trainer.accelerator=cpu", "trainer.max_epochs=2", "optim.warmup_epochs=0",
            "data.batch_size=8", "run_dir=run", *overrides]  # fmt: skip


def test_a_run_goes_on_and_its_evaluation_counts_what_it_read(root, tmp_path):
    arguments = ["data.max_bad_share=0.2", "data.num_workers=2", "data.check=true", "data.eval_batch_size=1"]
    done = subprocess.run(command(root, *arguments), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "checked: 36 of 40 images can be read" in done.stdout
    assert len(listed(tmp_path / "run" / "bad_samples.csv")) == 4
    script = TRAIN.parent / "scripts" / "evaluate.py"
    done = subprocess.run([sys.executable, script, "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "val split, 12 images" in done.stdout
    assert "2 more could not be read" in done.stdout
    result = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert (result["total"], result["unreadable"]) == (12, 2)
    assert len(listed(tmp_path / "run" / "evaluation" / "bad_samples.csv")) == 2


@pytest.mark.parametrize("option", ["data.num_workers=2", "data.check=true"])
def test_a_run_with_too_many_stops(root, tmp_path, option):
    done = subprocess.run(command(root, option), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line)
    assert line.startswith("train.py: ")
    assert line.endswith("cannot be read, more than data.max_bad_share=0.01 allows: run/bad_samples.csv lists them")


def test_one_of_two_processes_says_that_it_stops(root, tmp_path):
    """The other one, which speaks for both as a rule, learns no more than that it is gone."""
    (root / "train" / "ants" / "text.png").unlink()
    two = command(root, "trainer.devices=2", "data.num_workers=0", "seed=1")  # the second one meets it
    done = subprocess.run(two, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "train.py, process 1: 1 of 25 train images cannot be read, more than data.max_bad_share=" in done.stderr


def test_a_folder_without_images_is_refused_before_anything_is_written(tmp_path):
    for part in ("train", "val"):
        for name in CLASSES:
            (tmp_path / "set" / part / name).mkdir(parents=True)
    done = subprocess.run(command(tmp_path / "set"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Found no valid file for the classes ants, bees" in done.stderr
    assert not (tmp_path / "run").exists()


def test_sets_in_memory_have_no_list(tmp_path, digits):
    data = module(dataclasses.replace(digits), tmp_path / "bad.csv")
    list(data.val_dataloader())
    assert not (tmp_path / "bad.csv").exists()
