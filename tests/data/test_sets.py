"""Every data set opens with the right splits, labels and pixels, and says what is missing where it does not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sequencer.config.errors import RequestError
from sequencer.config.layouts import Layout
from sequencer.config.schema import DataConfig
from sequencer.data import DATA_SETS, DataModule, DataSet, FileSplit, IndexedSplit, has_test_split, open_split
from sequencer.data.sets import stratified_split

SPLITS = ("train", "val", "test")


def unchanged(image):
    return image


def open_splits(config):
    return {name: open_split(config, name, unchanged) for name in SPLITS}


def folder_of_images(root, **classes):
    """`root/split/class/i.png` for `split=[class, ...]`, two grey images per class."""
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (10, 12), (i, i, i)).save(root / split / name / f"{i}.png")
    return root


def test_the_table_and_the_schema_name_the_same_sets():
    (field,) = (field for field in dataclasses.fields(DataConfig) if field.name == "name")
    assert list(DATA_SETS) == list(field.metadata["choices"])


def test_digits_splits_are_disjoint_complete_and_stratified(digits):
    splits = open_splits(digits)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1295, "val": 143, "test": 359}
    everything = np.concatenate([split.indices for split in splits.values()])
    assert np.array_equal(np.sort(everything), np.arange(1797))
    counts = np.bincount(load_digits().target)
    for split, share in zip(splits.values(), (0.72, 0.08, 0.2), strict=True):
        assert np.all(np.abs(np.bincount(split.labels) - share * counts) <= 1)
        assert split.ids == [str(index) for index in split.indices]


def test_the_held_out_images_never_change(digits):
    """Published results stand only as long as the same images are held out."""
    splits = open_splits(digits)
    assert [split.indices[:6].tolist() for split in splits.values()] == [
        [0, 1, 2, 4, 5, 6],
        [16, 74, 80, 96, 101, 108],
        [3, 7, 13, 19, 36, 38],
    ]


def test_the_splits_ignore_the_global_random_states(digits):
    first = open_splits(digits)
    np.random.seed(7)
    torch.manual_seed(7)
    second = open_splits(digits)
    for name in SPLITS:
        assert np.array_equal(first[name].indices, second[name].indices)


def test_the_same_fraction_of_every_class_is_held_out():
    labels = np.repeat([0, 1, 2], [100, 30, 10])[np.random.default_rng(0).permutation(140)]
    kept, held = stratified_split(labels, 0.2)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(140))
    assert np.bincount(labels[held]).tolist() == [20, 6, 2]
    assert np.all(np.diff(kept) > 0)
    assert np.all(np.diff(held) > 0)


def test_digits_are_exact_sixteenths(digits):
    truth = load_digits()
    for split in open_splits(digits).values():
        for (image, label), index in zip(split, split.indices, strict=True):
            assert image.dtype == torch.float32
            assert np.array_equal(image[0].double().numpy() * 16, truth.images[index])
            assert label == truth.target[index]


def test_cifar10_has_the_official_splits(cifar10_root):
    splits = open_splits(DataConfig(name="cifar10", root=str(cifar10_root), num_classes=10))
    assert {name: len(split) for name, split in splits.items()} == {"train": 45_000, "val": 5_000, "test": 10_000}
    assert not set(splits["train"].indices) & set(splits["val"].indices)
    assert np.all(np.bincount(splits["val"].labels) == 500)
    assert splits["train"].class_names[:3] == ["airplane", "automobile", "bird"]
    image, label = splits["test"][0]
    assert (image.size, image.mode, splits["test"].class_names[label]) == ((32, 32), "RGB", "cat")


@pytest.mark.parametrize(
    ("name", "classes", "size"), [("mnist", 10, 28), ("fashion_mnist", 10, 28), ("cifar100", 100, 32)]
)
def test_torchvision_layouts(made_root, name, classes, size):
    splits = open_splits(DataConfig(name=name, root=str(made_root), num_classes=classes))
    assert {split: len(found) for split, found in splits.items()} == {
        "train": 9 * classes,
        "val": classes,
        "test": classes,
    }
    assert splits["train"].data.data_ptr() == splits["val"].data.data_ptr()  # one copy of the images
    scale = 1 if name == "cifar100" else 20
    for split in splits.values():
        assert len(split.class_names) == classes
        image, label = split[len(split) - 1]
        assert image.size == (size, size)
        assert np.all(np.asarray(image) == label * scale)
        assert label == split.labels[-1]


def test_photographs_as_image_folder(photographs_root):
    config = DataConfig(name="imagefolder", root=str(photographs_root))
    train, val = (open_split(config, name, unchanged) for name in ("train", "val"))
    assert (len(train), len(val)) == (244, 153)
    assert train.class_names == val.class_names == ["ants", "bees"]
    assert not has_test_split(config)
    assert train[0][0].mode == "RGB"
    assert val[len(val) - 1][1] == 1


def test_images_of_a_folder_are_named_by_their_paths(folder_root):
    split = open_split(DataConfig(name="imagefolder", root=str(folder_root)), "val", unchanged)
    assert split.ids[:2] == ["ants/00.png", "ants/02.png"]
    assert split.subset(np.array([7, 1])).ids == ["bees/03.png", "ants/02.png"]


@pytest.mark.parametrize("root", ["images", "~/images"])
def test_a_split_is_read_from_any_working_directory(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder_of_images(tmp_path / "images", train=["ants"])
    split = open_split(DataConfig(name="imagefolder", root=root), "train", unchanged)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert split.location == str(tmp_path / "images" / "train")
    assert split.ids == ["ants/0.png", "ants/1.png"]
    assert split[1][0].size == (10, 12)


def test_imagenet_keeps_synsets(tmp_path):
    synsets = ["n01443537", "n01440764"]
    root = folder_of_images(tmp_path, train=synsets, val=synsets, test=synsets)
    config = DataConfig(name="imagenet", root=str(root), num_classes=2)
    assert has_test_split(config)
    assert all(split.class_names == sorted(synsets) and len(split) == 4 for split in open_splits(config).values())


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_torchvision_set(name, tmp_path):
    with pytest.raises(RequestError) as error:
        open_split(DataConfig(name=name, root=str(tmp_path)), "train", unchanged)
    message = str(error.value)
    assert message.count("\n") == 1
    for phrase in (f"data={name}: no complete set in {tmp_path}", "data.download=true", "data.root="):
        assert phrase in message


def test_incomplete_torchvision_sets(made_root):
    (made_root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0" * 20)
    (made_root / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with (made_root / "cifar-100-python" / "train").open("ab") as file:
        file.write(b"more")
    for name in ("mnist", "fashion_mnist", "cifar100"):
        with pytest.raises(RequestError, match=f"data={name}: no complete set in .*\n.*data.download=true"):
            open_split(DataConfig(name=name, root=str(made_root)), "train", unchanged)


def test_failed_download(monkeypatch, tmp_path):
    def fail(self):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fail)
    with pytest.raises(RequestError, match=r"\(no network\)\ncheck the connection.*cifar-10-batches-py/.*data.root="):
        open_split(DataConfig(name="cifar10", root=str(tmp_path), download=True), "train", unchanged)


def expect_folder_error(root, match, split="train", name="imagefolder", **config):
    with pytest.raises(RequestError, match=match) as error:
        open_split(DataConfig(name=name, root=str(root), **config), split, unchanged)
    assert str(error.value).count("\n") <= 1
    return str(error.value)


def test_missing_image_folders(tmp_path):
    message = expect_folder_error(tmp_path / "nowhere", r"no complete set in .*nowhere.train \(No such file")
    assert "\ndata.root=... must name a folder with train/ and val/" in message
    assert "a folder of images per class" in message
    assert "n01440764" in expect_folder_error(tmp_path, "train/ and val/", name="imagenet")
    folder_of_images(tmp_path, train=["a"])
    for split in ("val", "test"):
        expect_folder_error(tmp_path, f"no complete set in {tmp_path / split} ", split=split)


def test_image_folders_without_images(tmp_path):
    (tmp_path / "train").mkdir()
    expect_folder_error(tmp_path, r"(?s)train \(Couldn't find any class folder.*data.root=")
    (tmp_path / "train" / "cats").mkdir()
    (tmp_path / "train" / "cats" / "readme.txt").write_text("no image")
    expect_folder_error(tmp_path, "(?s)no valid file for the classes cats.*data.root=")


def test_splits_with_other_classes(tmp_path):
    folder_of_images(tmp_path, train=["ants", "bees", "wasps"], val=["ants", "birds"], test=[f"c{i}" for i in range(9)])
    message = expect_folder_error(tmp_path, "other classes than train/", split="val", num_classes=3)
    assert "lacks bees, wasps and adds birds" in message
    assert "adds c0, c1, c2, c3, c4, ...\n" in expect_folder_error(tmp_path, "other classes", split="test")


def test_wrong_number_of_classes(tmp_path, digits):
    folder_of_images(tmp_path, train=["ants", "bees"])
    message = expect_folder_error(tmp_path, "data.num_classes=5, but 2 classes were found in .*train", num_classes=5)
    assert "data.num_classes=2" in message
    with pytest.raises(RequestError, match=r"data\.num_classes=9, but 10 classes"):
        open_split(dataclasses.replace(digits, num_classes=9), "test", unchanged)


@pytest.mark.parametrize("fraction", [0.0, 0.001])
def test_nothing_held_out(digits, fraction):
    config = dataclasses.replace(digits, val_fraction=fraction)
    for name in ("train", "val"):
        with pytest.raises(RequestError, match=r"data=digits has no validation split and data\.val_fraction=0.*e\.g\."):
            open_split(config, name, unchanged)
    assert len(open_split(config, "test", unchanged)) == 359


def test_transforms_are_applied_to_every_image(digits):
    split = open_split(digits, "test", lambda image: image.sum().item())
    assert [split[i][0] for i in range(3)] == [image.sum().item() for image in split.data[split.indices[:3]]]


def open_squares(config, name):
    """A data set as a user would add it: image files below `data.root`, with labels from their names."""
    paths = sorted(Path(config.root, "squares", name).glob("*.png"))
    if not paths:
        raise FileNotFoundError("no PNG files")
    return FileSplit([(str(path), int(path.stem[0])) for path in paths], ["black", "white"], config.root)


def test_a_set_of_files_is_added_by_a_row(tmp_path, monkeypatch):
    monkeypatch.setitem(
        DATA_SETS, "squares", DataSet(open_squares, has_test=lambda config: False, layout=Layout("squares"))
    )
    config = DataConfig(
        name="squares", root=str(tmp_path), img_size=8, mean=[0.0], std=[1.0], batch_size=4, num_workers=0
    )
    with pytest.raises(RequestError) as error:
        open_split(config, "train", unchanged)
    assert str(error.value) == (
        f"data=squares: no complete set in {tmp_path / 'squares'} (no PNG files)\n"
        "name the folder that holds squares/ with data.root=..."
    )
    (tmp_path / "squares" / "train").mkdir(parents=True)
    for number in range(20):
        image = Image.new("L", (8, 8), 255 * (number % 2))
        image.save(tmp_path / "squares" / "train" / f"{number % 2}_{number}.png")
    data = DataModule(config, seed=0)
    data.setup()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 18, "val": 2}
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    assert all(torch.equal(images[:, 0, 0, 0], labels.float()) for images, labels in batches)


class Numbers(IndexedSplit):
    """A split that a user would add for another way of storing images."""

    def load(self, index):
        return torch.full((1, 4, 4), index / 10)


def test_a_set_with_storage_of_its_own_is_added_by_a_class_and_a_row(monkeypatch):
    sizes = {"train": 10, "val": 3, "test": 5}
    row = DataSet(lambda config, name: Numbers(np.arange(sizes[name]) % 2, "ab", "numbers"), has_val=True)
    monkeypatch.setitem(DATA_SETS, "numbers", row)
    config = DataConfig(name="numbers", in_chans=1, img_size=4, mean=[0.0], std=[1.0], batch_size=5, num_workers=0)
    data = DataModule(config, seed=0)
    data.setup()
    (images, labels, indices), *_ = data.test_dataloader()
    assert torch.equal(images[:, 0, 0, 0], indices / 10)
    assert torch.equal(labels, indices % 2)
    assert sorted(round(10 * float(image[0, 0, 0])) for images, _ in data.train_dataloader() for image in images) == [
        *range(10)
    ]
    assert data.count_readable() == 18
