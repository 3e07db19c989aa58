"""The table of data sets, and how a split of one is opened.

A new data set is a row of `DATA_SETS`, a name in `sequencer.names` and a YAML file in `conf/data/`; `add_data_set` adds
one from outside the package. A row names a function that opens a split as a `FileSplit`, a `MemorySplit` or any other
`Split`; errors, held-out validation images and the check of the classes are the same for all sets.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.folder import find_classes

from sequencer import names
from sequencer.config.errors import RequestError
from sequencer.config.layouts import LAYOUTS, Layout, missing_data, split_folder
from sequencer.config.schema import DataConfig
from sequencer.data.filelist import has_test_rows, open_file_list
from sequencer.data.files import FileSplit, scan_folder
from sequencer.data.images import check_memory, reason_of
from sequencer.data.memory import MemorySplit
from sequencer.data.shard_files import read_index, resolve
from sequencer.data.shards import ShardSplit
from sequencer.data.split import Split, SplitName, Transform, stratified_split
from sequencer.data.transforms import resized_side
from sequencer.declared import UndeclaredContent
from sequencer.printing import printable

DIGITS_TEST_FRACTION = 0.2


def _always(config: DataConfig) -> bool:
    return True


@dataclass(frozen=True)
class DataSet:
    """What a data set needs.

    Args:
        open: opens a split of the configured set; called with `val` only if `has_val`. If it raises an error,
            the message for the user describes `layout`.
        has_val: whether the set has a validation split; otherwise `data.val_fraction` of its training images is held
            out, for which they must be readable one by one.
        has_test: whether the configured set has a test split.
        layout: where its files lie.
    """

    open: Callable[[DataConfig, SplitName], Split]
    has_val: bool = False
    has_test: Callable[[DataConfig], bool] = _always
    layout: Layout = field(default_factory=Layout)


def open_split(config: DataConfig, name: SplitName, transform: Transform) -> Split:
    """Opens one split of a data set; `transform` is applied to its images.

    For a set without a validation split, a fixed, stratified share (`data.val_fraction`) of the training images is held
    out, independent of the seed.

    Raises:
        RequestError: the set or the split is missing or incomplete, or its classes are not those expected.
    """
    row = DATA_SETS[config.name]
    held_out = not row.has_val and name != "test"
    stored: SplitName = "train" if held_out else name
    try:
        split = row.open(config, stored)
    except RequestError:
        raise
    except Exception as error:  # torchvision has no error of its own, and a damaged file may raise any
        raise missing_data(config, row.layout, stored, reason_of(error)) from error
    if len(split) == 0:
        raise RequestError(f"data={config.name}: there is no image in {printable(split.location)}")
    if config.num_classes not in (None, len(split.class_names)):
        found = len(split.class_names)
        raise RequestError(
            f"data={config.name}: data.num_classes={config.num_classes}, but {found} classes were found in "
            f"{printable(split.location)}; set data.num_classes={found}, or null to take what is found"
        )
    if held_out:
        split = split.subset(_train_or_val(split, config)[name == "val"])
    split.transform, split.shorter_side = transform, resized_side(config)
    return split


def has_test_split(config: DataConfig) -> bool:
    """Whether the configured data set has a test split."""
    return DATA_SETS[config.name].has_test(config)


def _train_or_val(split: Split, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train and to validate among a set's training images."""
    if split.labels is None:
        raise NotImplementedError(f"data={config.name}: labels must be known to hold out validation images")
    train, val = stratified_split(split.labels, config.val_fraction)
    if len(val) == 0:
        raise RequestError(
            f"data={config.name} has no validation split and data.val_fraction={config.val_fraction} holds out no"
            " training image; set it higher, e.g. data.val_fraction=0.1"
        )
    return train, val


def open_digits(config: DataConfig, name: SplitName) -> Split:
    """The 1,797 handwritten digits of scikit-learn as float tensors `1 8 8`; a fixed, stratified fifth is for testing.

    The grey values are k/16 for k from 0 to 16, which float32 holds exactly and eight bits would round.
    """
    from sklearn.datasets import load_digits  # the import takes a second, which other sets need not pay

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
    whole = MemorySplit(images, bunch.target, [str(digit) for digit in bunch.target_names], "scikit-learn")
    train, test = stratified_split(whole.labels, DIGITS_TEST_FRACTION)
    return whole.subset(test if name == "test" else train)


@lru_cache(maxsize=1)  # the training and the validation split share one copy of the images
def _load_torchvision(set_class: type, root: Path, train: bool, download: bool) -> Any:
    return set_class(root, train=train, download=download)


def open_decoded(set_class: type, config: DataConfig, name: SplitName) -> MemorySplit:
    """A set of torchvision that holds its decoded images as `data`: MNIST, CIFAR and the like."""
    found = _load_torchvision(set_class, _root(config), name != "test", config.download)
    height, width = found.data.shape[1:3]
    check_memory((width, height), resized_side(config))
    return MemorySplit(found.data, np.asarray(found.targets), found.classes, str(_root(config)))


def open_listed(set_class: type, config: DataConfig, name: SplitName) -> FileSplit:
    """A set of torchvision that lists image files: Flowers-102, Stanford Cars and the like."""
    found = set_class(_root(config), split=name, download=config.download, loader=str)  # items are (path, label)
    samples = [found[index] for index in range(len(found))]
    return FileSplit([(path, int(label)) for path, label in samples], found.classes, str(_root(config)))


def open_folder(config: DataConfig, name: SplitName) -> FileSplit:
    """A folder with one folder of images per class.

    Raises:
        RequestError: its classes are not those of the training images.
    """
    root = _root(config)
    folder = split_folder(root, name)
    samples, classes = scan_folder(str(folder))
    if (root / "train").is_dir():
        _check_same_classes(root, folder.name, classes)
    return FileSplit(samples, classes, str(folder))


def _check_same_classes(root: Path, name: str, classes: list[str]) -> None:
    """Labels are indices into the sorted class names: a split with other names would be labelled wrongly."""
    expected = find_classes(str(root / "train"))[0]
    differences = [
        f"{word} {printable(', '.join(sorted(names)[:5]))}{', ...' if len(names) > 5 else ''}"
        for word, names in (("lacks", set(expected) - set(classes)), ("adds", set(classes) - set(expected)))
        if names
    ]
    if differences:
        raise RequestError(
            f"{printable(root / name)} has other classes than train/: it {' and '.join(differences)}\n"
            "give every split the same class folders"
        )


def _has_test_folder(config: DataConfig) -> bool:
    return (_root(config) / "test").is_dir()


def _has_test_shards(config: DataConfig) -> bool:
    try:
        read_index(resolve(config.root, "test.json"))
    except OSError:
        return False
    except UndeclaredContent:
        pass  # a damaged index is refused where the split is opened
    return True


def _root(config: DataConfig) -> Path:
    return Path(config.root).expanduser().resolve()


DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet(open_digits),
    "mnist": DataSet(partial(open_decoded, datasets.MNIST), layout=LAYOUTS["mnist"]),
    "fashion_mnist": DataSet(partial(open_decoded, datasets.FashionMNIST), layout=LAYOUTS["fashion_mnist"]),
    "cifar10": DataSet(partial(open_decoded, datasets.CIFAR10), layout=LAYOUTS["cifar10"]),
    "cifar100": DataSet(partial(open_decoded, datasets.CIFAR100), layout=LAYOUTS["cifar100"]),
    "flowers102": DataSet(partial(open_listed, datasets.Flowers102), has_val=True, layout=LAYOUTS["flowers102"]),
    "stanford_cars": DataSet(partial(open_listed, datasets.StanfordCars), layout=LAYOUTS["stanford_cars"]),
    "imagefolder": DataSet(open_folder, has_val=True, has_test=_has_test_folder, layout=LAYOUTS["imagefolder"]),
    "imagenet": DataSet(open_folder, has_val=True, has_test=_has_test_folder, layout=LAYOUTS["imagenet"]),
    "filelist": DataSet(open_file_list, has_val=True, has_test=has_test_rows, layout=LAYOUTS["filelist"]),
    "webdataset": DataSet(ShardSplit, has_val=True, has_test=_has_test_shards, layout=LAYOUTS["webdataset"]),
}


def add_data_set(name: str, row: DataSet) -> None:
    """Adds a data set; `data.name=NAME` then selects it in this process."""
    DATA_SETS[name] = row
    if name not in names.DATA_SETS:
        names.DATA_SETS.append(name)
