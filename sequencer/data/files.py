"""Splits of image files."""

import os
from collections.abc import Sequence

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from sequencer.data.images import read_image
from sequencer.data.indexed import IndexedSplit
from sequencer.files import walk_once


class FileSplit(IndexedSplit):
    """Image files with labels.

    Args:
        samples: path and label of every image, as `scan_folder` returns them.
        location: folder that `ids` are relative to.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], class_names: Sequence[str], location: str) -> None:
        super().__init__([label for _, label in samples], class_names, location)
        self._paths = [path for path, _ in samples]

    def load(self, index: int) -> Image.Image:
        return read_image(self._paths[index], shorter_side=self.shorter_side)

    @property
    def ids(self) -> list[str]:
        prefix = os.path.join(self.location, "")  # `relpath` takes 10 s for the 1.3 million images of ImageNet
        paths = (self._paths[index] for index in self.indices)
        return [
            path[len(prefix) :] if path.startswith(prefix) else os.path.relpath(path, self.location) for path in paths
        ]


def scan_folder(folder: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Lists the images of a folder with one folder per class, in the order of torchvision's `ImageFolder`.

    Links are followed as by `walk_once`, so that a cycle of links adds no image. No file is opened.

    Returns:
        Path and label of every file with the suffix of an image, and the names of the classes.

    Raises:
        FileNotFoundError: the folder, or one of its classes, has no image.
    """
    classes = find_classes(folder)[0]
    samples: list[tuple[str, int]] = []
    empty = []
    for label, name in enumerate(classes):
        found = len(samples)
        for parent, files in sorted(walk_once(os.path.join(folder, name), folder)):
            images = sorted(file for file in files if file.lower().endswith(IMG_EXTENSIONS))
            samples += [(os.path.join(parent, file), label) for file in images]
        if len(samples) == found:
            empty.append(name)
    if empty:
        raise FileNotFoundError(
            f"Found no valid file for the classes {', '.join(empty)}. Images end with {', '.join(IMG_EXTENSIONS)}"
        )
    return samples, classes
