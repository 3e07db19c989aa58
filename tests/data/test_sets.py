"""Every set opens with the right parts, labels and pixels, and says what is missing where it does not."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data import open_dataset
from sequencer.data.sets import Split, has_test_part

PARTS: tuple[Split, ...] = ("train", "val", "test")


def unchanged(image):
    return image


def open_parts(config):
    return {part: open_dataset(config, part, unchanged) for part in PARTS}


def folder_of_images(root, **classes):
    """`root/part/class/i.png` for `part=[class, ...]`, two grey images a class."""
    for part, names in classes.items():
        for name in names:
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (10, 12), (i, i, i)).save(root / part / name / f"{i}.png")
    return root


def test_digits_parts_are_disjoint_complete_and_stratified(digits):
    parts = open_parts(digits)
    assert {name: len(part) for name, part in parts.items()} == {"train": 1295, "val": 143, "test": 359}
    everything = np.concatenate([part.indices for part in parts.values()])
    assert np.array_equal(np.sort(everything), np.arange(1797))
    counts = np.bincount(load_digits().target)
    for part, share in zip(parts.values(), (0.72, 0.08, 0.2), strict=True):
        assert np.all(np.abs(np.bincount(part.labels) - share * counts) <= 1)


def test_split_ignores_every_random_state(digits):
    first = open_parts(digits)
    np.random.seed(7)
    torch.manual_seed(7)
    second = open_parts(digits)
    for part in PARTS:
        assert np.array_equal(first[part].indices, second[part].indices)


def test_digits_are_exact_sixteenths(digits):
    truth = load_digits()
    for part in open_parts(digits).values():
        for (image, label), index in zip((part[i] for i in range(len(part))), part.indices, strict=True):
            assert image.dtype == torch.float32
            assert np.array_equal(image[0].double().numpy() * 16, truth.images[index])
            assert label == truth.target[index]


def test_cifar10_has_the_official_parts(cifar10_root):
    parts = open_parts(DataConfig(name="cifar10", root=str(cifar10_root), num_classes=10))
    assert {name: len(part) for name, part in parts.items()} == {"train": 45_000, "val": 5_000, "test": 10_000}
    assert parts["train"].source is parts["val"].source
    assert not set(parts["train"].indices) & set(parts["val"].indices)
    assert np.all(np.bincount(parts["val"].labels) == 500)
    assert parts["train"].class_names[:3] == ["airplane", "automobile", "bird"]
    image, label = parts["test"][0]
    assert (image.size, image.mode, parts["test"].class_names[label]) == ((32, 32), "RGB", "cat")


@pytest.mark.parametrize(
    ("name", "classes", "size"), [("mnist", 10, 28), ("fashion_mnist", 10, 28), ("cifar100", 100, 32)]
)
def test_torchvision_layouts(made_root, name, classes, size):
    parts = open_parts(DataConfig(name=name, root=str(made_root), num_classes=classes))
    assert {part: len(found) for part, found in parts.items()} == {
        "train": 9 * classes,
        "val": classes,
        "test": classes,
    }
    scale = 1 if name == "cifar100" else 20
    for part in parts.values():
        assert len(part.class_names) == classes
        image, label = part[len(part) - 1]
        assert image.size == (size, size)
        assert np.all(np.asarray(image) == label * scale)
        assert label == part.labels[-1]


def test_photographs_as_image_folder(photographs_root):
    config = DataConfig(name="imagefolder", root=str(photographs_root))
    train, val = (open_dataset(config, part, unchanged) for part in ("train", "val"))
    assert (len(train), len(val)) == (244, 153)
    assert train.class_names == val.class_names == ["ants", "bees"]
    assert not has_test_part(config)
    assert train[0][0].mode == "RGB"
    assert val[len(val) - 1][1] == 1


def test_imagenet_keeps_synsets(tmp_path):
    synsets = ["n01443537", "n01440764"]
    root = folder_of_images(tmp_path, train=synsets, val=synsets, test=synsets)
    parts = open_parts(DataConfig(name="imagenet", root=str(root), num_classes=2))
    assert all(part.class_names == sorted(synsets) and len(part) == 4 for part in parts.values())


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_torchvision_set(name, tmp_path):
    with pytest.raises(RequestError) as error:
        open_dataset(DataConfig(name=name, root=str(tmp_path)), "train", unchanged)
    message = str(error.value)
    assert message.count("\n") == 1
    for part in (f"data={name}", str(tmp_path), "data.download=true", "data.root="):
        assert part in message


def test_incomplete_torchvision_sets(made_root):
    (made_root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0" * 20)
    (made_root / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with (made_root / "cifar-100-python" / "train").open("ab") as file:
        file.write(b"more")
    for name in ("mnist", "fashion_mnist", "cifar100"):
        with pytest.raises(RequestError, match=f"data={name}: no complete set in .*\n.*data.download=true"):
            open_dataset(DataConfig(name=name, root=str(made_root)), "train", unchanged)


def test_failed_download(monkeypatch, tmp_path):
    def fail(self):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fail)
    with pytest.raises(RequestError, match=r"\(no network\)\ncheck the connection.*data.root="):
        open_dataset(DataConfig(name="cifar10", root=str(tmp_path), download=True), "train", unchanged)


def expect_folder_error(root, match, part="train", name="imagefolder", **config):
    with pytest.raises(RequestError, match=match) as error:
        open_dataset(DataConfig(name=name, root=str(root), **config), part, unchanged)
    assert str(error.value).count("\n") <= 1
    return str(error.value)


def test_missing_image_folders(tmp_path):
    message = expect_folder_error(tmp_path / "nowhere", r"no folder .*nowhere.train\ndata\.root=")
    assert "train/ and val/" in message
    assert "class" in message
    assert "n01440764" in expect_folder_error(tmp_path, "train/ and val/", name="imagenet")
    folder_of_images(tmp_path, train=["a"])
    expect_folder_error(tmp_path, "no folder .*val", part="val")
    expect_folder_error(tmp_path, "no folder .*test", part="test")


def test_image_folders_without_images(tmp_path):
    (tmp_path / "train").mkdir()
    expect_folder_error(tmp_path, "(?s)train: Couldn't find any class folder.*data.root=")
    (tmp_path / "train" / "cats").mkdir()
    (tmp_path / "train" / "cats" / "readme.txt").write_text("no image")
    expect_folder_error(tmp_path, "(?s)no valid file for the classes cats.*data.root=")


def test_parts_with_other_classes(tmp_path):
    folder_of_images(tmp_path, train=["ants", "bees", "wasps"], val=["ants", "birds"], test=[f"c{i}" for i in range(9)])
    message = expect_folder_error(tmp_path, "other classes than train/", part="val", num_classes=3)
    assert "lacks bees, wasps and adds birds" in message
    assert "adds c0, c1, c2, c3, c4, ...\n" in expect_folder_error(tmp_path, "other classes", part="test")


def test_wrong_number_of_classes(tmp_path, digits):
    folder_of_images(tmp_path, train=["ants", "bees"])
    message = expect_folder_error(tmp_path, "data.num_classes=5, but 2 classes were found in .*train", num_classes=5)
    assert "data.num_classes=2" in message
    with pytest.raises(RequestError, match=r"data\.num_classes=9, but 10 classes"):
        open_dataset(dataclasses.replace(digits, num_classes=9), "test", unchanged)


@pytest.mark.parametrize("fraction", [0.0, 0.001])
def test_nothing_held_out(digits, fraction):
    config = dataclasses.replace(digits, val_fraction=fraction)
    for part in ("train", "val"):
        with pytest.raises(RequestError, match=r"data=digits has no validation part and data\.val_fraction=0.*e\.g\."):
            open_dataset(config, part, unchanged)
    assert len(open_dataset(config, "test", unchanged)) == 359
