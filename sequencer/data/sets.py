"""Where the images come from: scikit-learn's digits, torchvision's sets, folders of images.

Every set is opened through `open_dataset` and looks the same afterwards: an `ImageSet`, a part of a set with its
class names. Anything missing ends in a `RequestError` that says what was looked for, where, and how to get it.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.folder import find_classes

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data.images import UnreadableImage, read_image
from sequencer.data.quarantine import Quarantine
from sequencer.data.shards import ShardSet, Split, has_index

FOLDER_SETS = ("imagefolder", "imagenet")
DIGITS_TEST_FRACTION = 0.2

# name: torchvision's class and the folder that it looks for below data.root
_TORCHVISION_SETS: dict[str, tuple[type, str]] = {  # decoded images in one file a part
    "mnist": (datasets.MNIST, "MNIST/raw"),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python"),
}
_LISTED_SETS: dict[str, tuple[type, str]] = {  # image files and lists of them
    "flowers102": (datasets.Flowers102, "flowers-102/jpg"),
    "stanford_cars": (datasets.StanfordCars, "stanford_cars/devkit"),
}
FILE_SETS = (*FOLDER_SETS, *_LISTED_SETS)


class ImageSet(Dataset[tuple[Any, int]]):
    """One part of a set of labelled images.

    Item `i` is `(transform(image), label)`: the image a PIL image, or for the digits a float tensor `1 8 8`, and the
    label an index into `class_names`.
    """

    quarantine: Quarantine | None = None

    def __init__(self, source: Any, indices: np.ndarray, transform: Callable[[Any], Any]) -> None:
        """`indices` are those of this part in `source`, which has torchvision's `classes` and `targets`."""
        self.source = source
        self.indices = indices
        self.transform = transform
        self.class_names: list[str] = list(source.classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """
        Raises:
            UnreadableImage: having been put into the quarantine, if there is one.
        """
        image, label = self.decode(index)
        return self.transform(image), label

    def decode(self, index: int) -> tuple[Any, int]:
        """The item before its transform."""
        try:
            return self.source[int(self.indices[index])]
        except UnreadableImage as found:
            if self.quarantine is not None:
                self.quarantine.report(found)
            raise

    @property
    def labels(self) -> np.ndarray:
        """Labels of all items in order, int64, without loading an image."""
        return np.asarray(self.source.targets, dtype=np.int64)[self.indices]

    @property
    def ids(self) -> list[str]:
        """What tells the items apart: image files' paths below their folder, others' places in the source."""
        if isinstance(self.source, datasets.ImageFolder | ImageFiles):
            return [os.path.relpath(self.source.samples[index][0], self.source.root) for index in self.indices]
        return [str(index) for index in self.indices]


class Digits:
    """The 1,797 handwritten digits of scikit-learn: grey values k/16 for k in 0..16, as float tensors `1 8 8`.

    Tensors, because eight-bit images would round the sixteenths; float32 holds them exactly.
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # here, since the import takes a second that other sets need not pay

        bunch = load_digits()
        self.data = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
        self.targets: list[int] = bunch.target.tolist()
        self.classes = [str(name) for name in bunch.target_names]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data[index], self.targets[index]


class ImageFiles:
    """Image files with labels, as torchvision's ImageFolder has them; `root` is a folder that holds them all."""

    def __init__(self, samples: list[tuple[str, int]], classes: list[str], root: str) -> None:
        self.samples, self.classes, self.root = samples, classes, root
        self.targets = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label


def open_dataset(config: DataConfig, split: Split, transform: Callable[[Any], Any]) -> ImageSet | ShardSet:
    """Open one part of a set; `transform` turns its images into what the caller wants.

    Sets without a validation part give a fixed, stratified share (`val_fraction`) of their training images; the test
    part of the digits is a fixed, stratified fifth. Neither depends on the seed.

    Raises:
        RequestError: the set or the part is missing or incomplete, or its classes are not those expected.
    """
    source: Any
    if config.name == "webdataset":
        return ShardSet(config, split, transform)
    if config.name in FOLDER_SETS:
        source = _open_folder(config, split)
    elif config.name == "digits":
        source = Digits()
    elif config.name in _LISTED_SETS:
        source = _open_listed(config, split)
    else:
        source = _open_torchvision(config.name, config.root, split != "test", config.download)
    if config.num_classes not in (None, len(source.classes)):
        raise RequestError(
            f"data={config.name}: data.num_classes={config.num_classes}, but {len(source.classes)} classes were found"
            f"{f' in {_root(config) / split}' if config.name in FOLDER_SETS else ''};"
            f" set data.num_classes={len(source.classes)}, or null to take what is found"
        )
    return ImageSet(source, _part(config, split, np.asarray(source.targets)), transform)


def has_test_part(config: DataConfig) -> bool:
    """Whether the set has test images: all have, but for image folders without `test/` and shards without such."""
    if config.name == "webdataset":
        return has_index(config, "test")
    return config.name not in FOLDER_SETS or (_root(config) / "test").is_dir()


def stratified_split(targets: np.ndarray, indices: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Hold out `fraction` of `indices`, the same share of every class; returns (kept, held), both sorted.

    The result is a function of the arguments alone: NumPy promises never to change RandomState's stream.
    """
    random_state = np.random.RandomState(0)
    held = []
    for label in np.unique(targets[indices]):
        members = random_state.permutation(indices[targets[indices] == label])
        held.append(members[: round(fraction * len(members))])
    held_indices = np.sort(np.concatenate(held))
    return np.setdiff1d(indices, held_indices), held_indices


def _part(config: DataConfig, split: Split, targets: np.ndarray) -> np.ndarray:
    """Indices of a part among the images that its source holds."""
    indices = np.arange(len(targets))
    if config.name == "digits":
        indices, test = stratified_split(targets, indices, DIGITS_TEST_FRACTION)
        if split == "test":
            return test
    if config.name in (*FOLDER_SETS, "flowers102") or split == "test":
        return indices
    train, val = stratified_split(targets, indices, config.val_fraction)
    if len(val) == 0:
        raise RequestError(
            f"data={config.name} has no validation part and data.val_fraction={config.val_fraction} holds out no"
            " training image; set it higher, e.g. data.val_fraction=0.1"
        )
    return train if split == "train" else val


@lru_cache(maxsize=1)  # the training and the validation part share one copy of the images
def _open_torchvision(name: str, root: str, train: bool, download: bool) -> Any:
    set_class, folder = _TORCHVISION_SETS[name]
    return _explained(lambda path: set_class(path, train=train, download=download), name, root, folder, download)


def _open_listed(config: DataConfig, split: Split) -> ImageFiles:
    """Flowers-102 has a validation part; the Stanford Cars give some of their training images."""
    set_class, folder = _LISTED_SETS[config.name]
    part = "train" if config.name == "stanford_cars" and split == "val" else split

    def listed(path: Path) -> Any:
        return set_class(path, split=part, download=config.download, loader=str)  # paths for images

    found = _explained(listed, config.name, config.root, folder, config.download)
    samples = [found[index] for index in range(len(found))]
    return ImageFiles([(path, int(label)) for path, label in samples], list(found.classes), str(_root(config)))


def _explained(open_set: Callable[[Path], Any], name: str, root: str, folder: str, download: bool) -> Any:
    """What `open_set` makes of the folder `root`.

    Raises:
        RequestError: it fails.
    """
    path = Path(root).expanduser()
    try:
        return open_set(path)
    # torchvision has no error of its own: what is absent, cut short or not downloadable ends in one of these
    except (OSError, EOFError, RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "check the connection" if download else "fetch it with data.download=true"
        if name == "stanford_cars":
            remedy = "its original address is gone: fetch it elsewhere"
        raise RequestError(
            f"data={name}: no complete set in {(path / folder).resolve()} ({reason})\n"
            f"{remedy}, or name the folder that holds {folder.partition('/')[0]}/ with data.root=..."
        ) from error


def _open_folder(config: DataConfig, split: Split) -> datasets.ImageFolder:
    root = _root(config)
    entries = "a folder per synset (n01440764, ...)" if config.name == "imagenet" else "a folder of images per class"
    layout = f"data.root=... must name a folder with train/ and val/ (test/ is optional), each with {entries}"
    if not (root / split).is_dir():
        raise RequestError(f"data={config.name}: no folder {root / split}\n{layout}")
    try:
        source = datasets.ImageFolder(str(root / split), loader=read_image)
    except FileNotFoundError as error:  # no class folder, or one without images; the message says which
        raise RequestError(f"data={config.name}: {root / split}: {error}\n{layout}") from error
    if (root / "train").is_dir():
        _check_same_classes(root, split, source.classes)
    return source


def _check_same_classes(root: Path, split: Split, classes: list[str]) -> None:
    """Labels are positions in the sorted class names, so that parts with other names would be labelled wrongly."""
    expected = find_classes(str(root / "train"))[0]
    differences = [
        f"{word} {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for word, names in (("lacks", set(expected) - set(classes)), ("adds", set(classes) - set(expected)))
        if names
    ]
    if differences:
        raise RequestError(
            f"{root / split} has other classes than train/: it {' and '.join(differences)}\n"
            "give every part the same class folders"
        )


def _root(config: DataConfig) -> Path:
    return Path(config.root).expanduser().resolve()
