"""Image files that cannot be read, or not as they are: decoding, training, evaluation, and the record of them."""

import csv
import json
import multiprocessing
import pickle
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sequencer.config.composition import compose
from sequencer.config.errors import RequestError, summarise_error
from sequencer.config.schema import AugmentConfig, Config, DataConfig
from sequencer.data import DataModule, Quarantine, TooManyBadImages, UnreadableImage, open_split, read_image
from sequencer.data.quarantine import COLUMNS
from sequencer.data.seeding import SeededSet
from sequencer.training import run
from tests.processes import start_ranks

MODEL = "model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}"
pytestmark = pytest.mark.usefixtures("unrendered")
BAD = ("broken.png", "text.png", "truncated.jpg", "zero.jpg")


@pytest.fixture
def write_bad(write_noise):
    """`write_bad(path)` writes what the name of the file says, one of `BAD`."""

    def write(path: Path) -> Path:
        if path.name == "text.png":
            path.write_text("not an image")
        elif path.name == "zero.jpg":
            path.touch()
        else:
            content = bytearray(write_noise(path, size=(100, 100)).read_bytes())
            content[2000:] = bytes(100) + content[2100:] if path.name == "broken.png" else b""
            path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_error(tmp_path, write_bad, name):
    path = write_bad(tmp_path / name)
    with pytest.raises(UnreadableImage) as error:
        read_image(path)
    assert error.value.path == str(path)
    assert error.value.reason
    assert "\n" not in error.value.reason


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns from there on and refuses twice as many
    for width in (10, 15, 20):
        Image.new("1", (width, 10)).save(tmp_path / f"{width}.png")
        assert read_image(tmp_path / f"{width}.png").size == (width, 10)
    Image.new("1", (21, 10)).save(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        read_image(tmp_path / "bomb.png")


def test_the_error_keeps_its_path_and_reason_between_processes():
    error = UnreadableImage(Path("a.jpg"), "no image")
    received = pickle.loads(pickle.dumps(error))
    assert (received.path, received.reason) == ("a.jpg", "no image")
    assert str(received) == str(error) == "('a.jpg', 'no image')"


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


@pytest.fixture
def root(folder_root, tmp_path, write_bad) -> Path:
    """Two classes with 12 images each to train and 6 to validate, and in each split two files that cannot be read."""
    root = Path(shutil.copytree(folder_root, tmp_path / "set"))
    for split in ("train", "val"):
        write_bad(root / split / "ants" / "text.png")
        write_bad(root / split / "bees" / "zero.jpg")
    return root


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
        return sorted((row["split"], Path(row["path"]).name) for row in reader)


def listing(config: DataConfig, path: Path) -> DataModule:
    """Lists unreadable images in `path`."""
    data = DataModule(config, 0, bad_samples=path)
    data.setup()
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_training_takes_another_image_and_evaluation_none(root, tmp_path, workers):
    path = tmp_path / "run" / "bad_samples.csv"
    data = listing(config(root, workers), path)
    epochs = [[images for images, _ in data.train_dataloader()] for _ in range(2)]
    assert [len(batch) for batch in epochs[0]] == [13, 13]
    assert all(torch.equal(a, b) for a, b in zip(*epochs, strict=True))  # still a function of seed, epoch and index
    assert sum(len(labels) for _, labels, _ in data.val_dataloader()) == 12
    bad = [(split, name) for split in ("train", "val") for name in ("text.png", "zero.jpg")]
    assert listed(path) == bad
    listing(config(root, workers), path)
    assert sum(len(labels) for _, labels, _ in data.val_dataloader()) == 12
    assert listed(path) == bad  # each once, however often it is found


def test_workers_change_nothing(root, tmp_path):
    alone, helped = (listing(config(root, workers), tmp_path / f"{workers}.csv") for workers in (0, 2))
    for a, b in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_a_file_that_vanishes_between_two_batches(root, tmp_path):
    data = listing(config(root), tmp_path / "bad.csv")
    batches = iter(data.train_dataloader())
    next(batches)
    for path in (root / "train" / "ants").glob("*.png"):
        path.unlink()
    assert len(next(batches)[0]) == 13
    with open(tmp_path / "bad.csv", newline="") as file:
        assert "No such file or directory" in {row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_are_an_error(root, tmp_path, workers):
    data = listing(config(root, workers, share=0.05), tmp_path / "bad.csv")
    limit = r"2 of 26 train images cannot be read, more than data\.max_bad_share=0\.05"
    with pytest.raises(TooManyBadImages, match=limit) as error:
        list(data.train_dataloader())
    traceback.clear_frames(error.tb)  # they hold the workers, whose end the garbage collector awaits for 5 seconds each


@pytest.mark.parametrize("workers", [0, 2])
def test_the_readable_images_are_counted(root, tmp_path, workers):
    data = listing(config(root, workers), tmp_path / "bad.csv")
    assert data.count_readable() == 36
    assert len(listed(tmp_path / "bad.csv")) == 4
    with pytest.raises(TooManyBadImages, match="2 of 26 train images"):
        listing(config(root, workers, share=0.05), tmp_path / "strict.csv").count_readable()


def test_a_split_is_probed(root, tmp_path):
    val = listing(config(root), tmp_path / "bad.csv").val_set
    bad = [str(root / "val" / path) for path in ("ants/text.png", "bees/zero.jpg")]
    assert val.probe(500) == (14, bad)
    assert val.probe(7) == (7, bad[:1])  # every second one
    assert listed(tmp_path / "bad.csv") == [("val", "text.png"), ("val", "zero.jpg")]


def test_examples_are_readable(root):
    data = DataModule(config(root), 0)
    data.setup()
    assert len(data.val_set.examples(100)) == 12
    few = data.val_set.examples(3)
    assert [label for _, label in few] == [0, 0, 1]
    assert few[0][0].shape == (3, 16, 16)


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


def test_the_share_that_is_allowed_may_be_reached(tmp_path):
    quarantine = Quarantine(tmp_path / "bad.csv", "train", 10, 0.1)
    for _ in range(2):
        quarantine.report(UnreadableImage("a.jpg", "one"))
    with pytest.raises(TooManyBadImages, match="2 of 10 train images"):
        quarantine.report(UnreadableImage("b.jpg", "two"))


def test_a_split_without_a_readable_image_is_an_error():
    class Unreadable:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> None:
            raise UnreadableImage(f"{index}.jpg", "no image")

    with pytest.raises(RuntimeError, match="none of 1000 training images drawn one after another can be read"):
        SeededSet(Unreadable(), seed=0).__getitems__([(0, 0)])


def test_replacements_are_drawn(root):
    """The neighbour of a bad image would be trained on twice as often."""
    split = open_split(config(root), "train", np.asarray)
    bad = split.ids.index("ants/text.png")
    drawn = SeededSet(split, seed=0).__getitems__([(epoch, bad) for epoch in range(20)])
    assert len({image.tobytes() for image, _ in drawn}) > 8


def test_a_line_torn_by_a_kill(tmp_path):
    path = tmp_path / "bad.csv"
    quarantine = Quarantine(path, "train", 10, 1.0)
    quarantine.report(UnreadableImage("a.jpg", "one"))
    path.write_text(path.read_text() + "train,b.j")
    quarantine.report(UnreadableImage("b.jpg", "two"))
    quarantine.report(UnreadableImage("a.jpg", "one"))
    lines = path.read_text().splitlines()
    assert lines == ["split,path,reason", "train,a.jpg,one", "train,b.j", "train,b.jpg,two"]


def overrides(root: Path, run_dir: Path, *changes: str) -> list[str]:
    return ["data=imagefolder", f"data.root={root}", "data.img_size=16", MODEL, "data.augment.scale=null",
            "model.name=sequencer2d_t_8", "trainer.accelerator=cpu", "trainer.max_epochs=1", "optim.warmup_epochs=0",
            "trainer.enable_progress_bar=false", "logger.report=false", "data.batch_size=8", f"run_dir={run_dir}",
            *changes]  # fmt: skip


def wanted(root: Path, run_dir: Path, *changes: str) -> Config:
    return compose(overrides(root, run_dir, *changes))


def test_a_run_goes_on_and_its_evaluation_counts_what_it_read(root, tmp_path, load_script, capsys):
    options = ["data.max_bad_share=0.2", "data.num_workers=2", "data.check=true", "data.eval_batch_size=1"]
    run(wanted(root, tmp_path / "run", *options))
    assert "checked: 36 of 40 images can be read" in capsys.readouterr().out
    assert len(listed(tmp_path / "run" / "bad_samples.csv")) == 4
    assert load_script("evaluate").main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "12 images" in printed
    assert "2 more could not be read" in printed
    result = json.loads(
        (tmp_path / "run" / "evaluation" / "imagefolder-val-raw-16px-crop0.875" / "evaluation.json").read_text()
    )
    assert (result["total"], result["unreadable"]) == (12, 2)
    assert len(listed(tmp_path / "run" / "evaluation" / "imagefolder-val-raw-16px-crop0.875" / "bad_samples.csv")) == 2


@pytest.mark.parametrize("option", ["data.num_workers=2", "data.check=true"])
def test_a_run_with_too_many_stops(root, tmp_path, option):
    with pytest.raises(TooManyBadImages) as error:
        run(wanted(root, tmp_path / "run", option))
    traceback.clear_frames(error.tb)
    (line,) = summarise_error(error.value).splitlines()  # also of a worker, which hands on its whole traceback
    assert " images cannot be read, more than data.max_bad_share=0.01 allows: " in line
    assert line.endswith(f"{tmp_path / 'run' / 'bad_samples.csv'} lists them")


def test_the_rank_that_stops_says_so(root, tmp_path):
    """Rank 0, which prints the errors of all ranks, learns only that the connection is lost."""
    (root / "train" / "ants" / "text.png").unlink()
    ranks = start_ranks(2, overrides(root, tmp_path / "run", "data.num_workers=0", "seed=1"), tmp_path)
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert ranks[1].returncode == 1, errors
    assert ranks[0].returncode != 0
    assert "rank 1: 1 of 25 train images cannot be read, more than data.max_bad_share=" in errors[1]


def test_a_folder_without_images_is_refused_before_anything_is_written(tmp_path):
    for split in ("train", "val"):
        for name in ("ants", "bees"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
    with pytest.raises(RequestError, match="Found no valid file for the classes ants, bees"):
        run(wanted(tmp_path / "set", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_sets_in_memory_have_no_list(tmp_path, digits):
    data = listing(digits, tmp_path / "bad.csv")
    list(data.val_dataloader())
    assert not (tmp_path / "bad.csv").exists()
