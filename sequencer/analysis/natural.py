"""Accuracy of ImageNet classifiers on other natural images: ImageNet-A, -R, -V2, Sketch, and the labels of ReaL.

ImageNet-A and ImageNet-R have images of 200 of the 1,000 classes. As in timm, a prediction is the largest logit among
these classes, and the clean accuracy beside it is that on their images in the validation set of ImageNet.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timm.data import ImageNetInfo, RealLabelsImagenet

from sequencer.analysis.robustness import Predicted
from sequencer.config.errors import RequestError
from sequencer.config.layouts import split_folder
from sequencer.data import FileSplit
from sequencer.data.files import scan_folder
from sequencer.printing import printable

CLASSES = 1000
VALIDATION_IMAGES = 50_000


class Variant(NamedTuple):
    """A set of images with labels of ImageNet."""

    title: str
    num_classes: int


VARIANTS = {
    "a": Variant("ImageNet-A", 200),
    "r": Variant("ImageNet-R", 200),
    "v2": Variant("ImageNet-V2", CLASSES),
    "sketch": Variant("ImageNet-Sketch", CLASSES),
    "real": Variant("ImageNet, ReaL labels", CLASSES),
}


def class_indices(folders: Sequence[str]) -> list[int]:
    """Returns the index among the 1,000 classes of each folder, which is named by a synset or, as in V2, by an index.

    Raises:
        ValueError: A name is neither.
    """
    synsets = {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    known = synsets | {str(index): index for index in range(CLASSES)}
    if unknown := [name for name in folders if name not in known]:
        raise ValueError(f"{printable(unknown[0])} is neither a synset of ImageNet-1k nor an index of a class")
    return [known[name] for name in folders]


def open_folder(root: str, option: str, num_classes: int | None = None) -> tuple[FileSplit, list[int]]:
    """Opens a folder with a folder of images per class; the labels are indices among the 1,000 classes.

    Args:
        root: The folder, or the one that holds it as `val/`.
        option: The option that names it, for messages.
        num_classes: How many classes it must have; by default any number.

    Returns:
        The split, and the sorted indices of its classes.

    Raises:
        RequestError: The folder is missing, or its classes are others.
    """
    folder = split_folder(root, "val")
    folder = folder if folder.is_dir() else Path(root).expanduser()
    try:
        samples, names = scan_folder(str(folder))
        indices = class_indices(names)
    except (OSError, ValueError) as error:
        raise RequestError(f"{option} {printable(root)}: {printable(error)}") from error
    if num_classes not in (None, len(names)):
        raise RequestError(f"{option} {printable(root)}: it has {len(names)} classes, not {num_classes}")
    labelled = [(path, indices[label]) for path, label in samples]
    return FileSplit(labelled, [str(index) for index in range(CLASSES)], str(folder)), sorted(indices)


def of_classes(split: FileSplit, classes: Sequence[int]) -> FileSplit:
    """The images of a split that are of some classes.

    Raises:
        RequestError: There is none.
    """
    chosen = np.flatnonzero(np.isin(split.labels, classes))
    if not len(chosen):
        raise RequestError(f"{printable(split.location)} has no image of these classes")
    result = split.subset(chosen)
    assert isinstance(result, FileSplit)
    return result


def real_labels(ids: Sequence[str]) -> list[list[int]]:
    """Labels of ReaL (Beyer et al. 2020, arXiv 2006.07159) of images of the validation set, by the names of files.

    Args:
        ids: Paths that end with names such as `ILSVRC2012_val_00000001.JPEG`.

    Returns:
        The classes that are right for each image; none for an image that ReaL leaves out.

    Raises:
        RequestError: A file has another name.
    """
    labels = RealLabelsImagenet([""] * VALIDATION_IMAGES).real_labels
    names = [Path(path).name for path in ids]
    if other := [name for name in names if name not in labels]:
        raise RequestError(
            f"{printable(other[0])} is not named as in ImageNet's validation set, e.g. ILSVRC2012_val_00000001.JPEG"
        )
    return [labels[name] for name in names]


def count_real(predicted: Predicted, labels: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Counts the images that have labels of ReaL, and those whose predicted class is one of them.

    Args:
        predicted: Predictions of the images.
        labels: As `real_labels` returns them, by index of the image.
    """
    pairs = [(k, labels[i]) for k, i in zip(predicted.classes.tolist(), predicted.indices.tolist(), strict=True)]
    labelled = [k in right for k, right in pairs if right]
    return len(labelled), sum(labelled)
