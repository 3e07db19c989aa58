"""Files that are no images of the formats that are read, no files at all, or images that take too much memory."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from sequencer.config.composition import compose
from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data import (
    DataModule,
    FileSplit,
    MemorySplit,
    UnreadableImage,
    eval_transform,
    read_image,
    resized_side,
    train_transform,
)
from sequencer.data.images import FORMATS, check_memory

TOO_MUCH = "takes more than 1536 MiB"
EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SPECIAL: list[Callable[[Path], None]] = [make_fifo, make_socket, make_device, Path.mkdir]


@pytest.mark.parametrize("make", SPECIAL)
def test_what_is_no_regular_file_is_not_opened(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "image.png")
    with pytest.raises(UnreadableImage, match="no regular file"):
        read_image(tmp_path / "image.png")


def test_a_link_to_itself_is_unreadable(tmp_path):
    (tmp_path / "image.png").symlink_to("image.png")
    with pytest.raises(UnreadableImage, match="symbolic links"):
        read_image(tmp_path / "image.png")


def test_postscript_does_not_start_ghostscript(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    (tmp_path / "image.jpg").write_text(EPS)
    for file in (None, io.BytesIO(EPS.encode())):
        with pytest.raises(UnreadableImage, match="no image in one of the formats JPEG, PNG"):
            read_image(tmp_path / "image.jpg", file)
    assert not started


@pytest.mark.parametrize("kind", ["TGA", "PCX", "SGI", "ICO", "MSP", "PDF", "DDS"])
def test_other_formats_are_not_decoded(tmp_path, kind):
    Image.new("1" if kind == "MSP" else "RGB", (16, 16)).save(tmp_path / "image.png", kind)
    with pytest.raises(UnreadableImage, match="no image in one of the formats JPEG, PNG"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_formats_that_are_named_are_decoded_whatever_the_suffix(tmp_path, kind):
    Image.new("RGB", (16, 16), (200, 200, 200)).save(tmp_path / "image.txt", kind)
    assert read_image(tmp_path / "image.txt").getpixel((3, 3)) == (200, 200, 200)


def imagefolder(root: Path, *changes: str) -> DataConfig:
    return compose(["data=imagefolder", f"data.root={root}", "data.num_workers=0", "data.batch_size=8", *changes]).data


@pytest.fixture
def thin(tmp_path) -> Path:
    """A PNG of 1 x 60000 pixels; as an image whose shorter side has 256 pixels it would take 15 GB."""
    Image.new("1", (1, 60000)).save(tmp_path / "thin.png")
    assert (tmp_path / "thin.png").stat().st_size < 400
    return tmp_path / "thin.png"


def test_an_image_that_resizing_would_blow_up_is_not_decoded(thin, monkeypatch):
    assert read_image(thin).size == (1, 60000)
    loaded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self))
    with pytest.raises(UnreadableImage, match=f"it has 1 x 60000 pixels: resizing it to 256 pixels {TOO_MUCH}"):
        read_image(thin, shorter_side=256)
    assert not loaded


@pytest.mark.parametrize("size", [(1, 100_000_000), (100_000_000, 1)])
def test_rows_take_memory_too(size):
    """A row holds a pointer, however short it is."""
    if size[0] == 1:
        with pytest.raises(ValueError, match=f"decoding it {TOO_MUCH}"):
            check_memory(size)
    else:
        check_memory(size)


def test_what_pillow_considers_safe_may_be_resized():
    side = int(Image.MAX_IMAGE_PIXELS**0.5 * 2**0.5)
    for shape in ((side, side), (4 * side, side // 4), (65535, 2700), (30, 30_000)):
        check_memory(shape, 256)


def test_the_bound_holds_for_every_transform_that_resizes():
    """The memory of a resize is that of Pillow's image between its two passes and of the result."""
    for options in ([], ["data.augment.scale=null"], ["data.crop_pct=0.5"], ["data.augment.ratio=[0.001,1000]"]):
        config = imagefolder(Path("x"), "data.img_size=16", *options)
        side = resized_side(config)
        for size in ((3, 4000), (4000, 3), (50, 70)):
            taken = []
            resize = Image.Image.resize

            def measuring(self, new, *args, box=None, taken=taken, resize=resize, **kwargs):
                _left, top, _right, bottom = box or (0, 0, *self.size)
                taken.append(4 * new[0] * (bottom - top + new[1]))
                return resize(self, new, *args, box=box, **kwargs)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Image.Image, "resize", measuring)
                for transform in (train_transform(config), eval_transform(config)):
                    for _ in range(5):
                        transform(Image.new("RGB", size))
            short, long = sorted(size)
            assert 0 < max(taken) <= 4 * side * (long + side * long // short)


def test_a_webp_image_is_counted_with_the_copies_of_its_decoder(tmp_path, monkeypatch):
    monkeypatch.setattr("sequencer.data.images.MOST_MEMORY", 2**20)
    for kind in ("webp", "jpg"):
        Image.new("RGB", (300, 300)).save(tmp_path / f"image.{kind}")
    assert read_image(tmp_path / "image.jpg").size == (300, 300)
    with pytest.raises(UnreadableImage, match="decoding it takes more than 1 MiB"):
        read_image(tmp_path / "image.webp")


def test_an_image_without_pixels_is_unreadable(tmp_path):
    (tmp_path / "empty.gif").write_bytes(b"GIF89a" + bytes(4) + b"\x00\x00\x00;")
    (tmp_path / "empty.ppm").write_bytes(b"P6 0 4 255\n")
    for name in ("empty.gif", "empty.ppm"):
        with pytest.raises(UnreadableImage):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="it has no pixels"):
        check_memory((0, 4))


def test_the_tiles_of_a_small_image_are_bounded(tmp_path):
    """A TIFF file of 16 x 16 pixels whose only tile has 40000 x 40000."""
    content = zlib.compress(bytes(1000))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 40_000), (323, 40_000)]
    tags += [(324, 8), (325, len(content))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(content)
    (tmp_path / "tile.tif").write_bytes(b"II*\x00" + struct.pack("<I", start) + content + directory + bytes(4))
    with pytest.raises(UnreadableImage, match=f"40000 x 40000 pixels: decoding it {TOO_MUCH}"):
        read_image(tmp_path / "tile.tif")


def test_sixteen_bits_take_no_more_memory_than_promised(tmp_path):
    values = np.full((3, 5), 70_000, dtype=np.int32)
    Image.fromarray(values).save(tmp_path / "wide.tif")
    assert read_image(tmp_path / "wide.tif").getpixel((0, 0)) == (255, 255, 255)


@pytest.fixture
def folder(folder_root, tmp_path) -> Path:
    """An image folder in whose classes a thin image, a FIFO, a device and PostScript lie besides 24 and 12 images."""
    root = tmp_path / "set"
    for split in ("train", "val"):
        for name in ("ants", "bees"):
            (root / split / name).mkdir(parents=True)
            for image in (folder_root / split / name).iterdir():
                (root / split / name / image.name).symlink_to(image)
        Image.new("1", (1, 60000)).save(root / split / "ants" / "thin.png")
        make_fifo(root / split / "ants" / "fifo.png")
        make_device(root / split / "bees" / "device.png")
        (root / split / "bees" / "eps.jpg").write_text(EPS)
    return root


def test_training_and_evaluation_leave_them_out(folder, tmp_path):
    data = DataModule(imagefolder(folder, "data.max_bad_share=0.5"), 0, bad_samples=tmp_path / "bad.csv")
    data.setup()
    assert len(data.train_set) == 28
    assert [len(images) for images, _ in data.train_dataloader()] == [8] * 3
    assert sum(len(labels) for _, labels, _ in data.val_dataloader()) == 12
    assert data.count_readable() == 36
    assert [Path(path).name for path in data.val_set.probe(100)[1]] == ["fifo.png", "thin.png", "device.png", "eps.jpg"]


def test_sets_in_memory_are_bounded_as_well(made_root):
    folder = made_root / "MNIST" / "raw"
    header = np.array([0x0803, 1, 1, 400_000], dtype=">i4").tobytes()
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(400_000))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x0801, 1], dtype=">i4").tobytes() + b"\x00")
    config = compose(["data=mnist", f"data.root={made_root}", "data.img_size=128"]).data
    with pytest.raises(RequestError, match=TOO_MUCH):
        DataModule(config, 0).setup()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        np.array([0x0803, 10**9, 10**9, 10**9], dtype=">i4").tobytes(),
        np.array([0x0803, -1, 28, 28], dtype=">i4").tobytes() + bytes(784),
        np.array([0x7703, 1, 28, 28], dtype=">i4").tobytes() + bytes(784),
        np.array([0x0D03, 1, 28, 28], dtype=">i4").tobytes() + bytes(4 * 784),
        np.array([0x0801, 784], dtype=">i4").tobytes() + bytes(784),
        np.array([0x0803, 0, 28, 28], dtype=">i4").tobytes(),
        np.array([0x0803, 1, 0, 28], dtype=">i4").tobytes(),
        np.array([0x0803, 1, 28, 28], dtype=">i4").tobytes() + bytes(784),
    ],
)
def test_damaged_files_of_a_set_in_memory_are_refused(made_root, content):
    (made_root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(RequestError, match="data=mnist: "):
        DataModule(compose(["data=mnist", f"data.root={made_root}"]).data, 0).setup()


@pytest.mark.parametrize("content", [5, (1, 2), (torch.zeros(3, 28, 28, dtype=torch.int64), torch.zeros(3)), [[], []]])
def test_damaged_files_of_an_older_torchvision_are_refused(made_root, content):
    (made_root / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save(content, made_root / "MNIST" / "processed" / name)
    with pytest.raises(RequestError, match="data=mnist: no complete set"):
        DataModule(compose(["data=mnist", f"data.root={made_root}"]).data, 0).setup()


def test_labels_that_no_class_has_are_refused(made_root):
    images = torch.zeros(3, 1, 8, 8)
    with pytest.raises(ValueError, match="its labels go from 0 to 2, and it has 2 classes"):
        MemorySplit(images, [0, 1, 2], ["a", "b"], "memory")
    with pytest.raises(ValueError, match="it has 3 images and 2 labels"):
        MemorySplit(images, [0, 1], ["a", "b"], "memory")
    with pytest.raises(ValueError, match="its labels go from -1 to 0"):
        FileSplit([("a.png", -1), ("b.png", 0)], ["a"], ".")
    path = made_root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x4d")
    with pytest.raises(RequestError, match="its labels go from 0 to 77, and it has 10 classes"):
        DataModule(compose(["data=mnist", f"data.root={made_root}"]).data, 0).setup()
