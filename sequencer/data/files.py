"""Splits of image files."""

import os
from collections.abc import Sequence

from PIL import Image

from sequencer.data.images import read_image
from sequencer.data.indexed import IndexedSplit


class FileSplit(IndexedSplit):
    """Image files with labels.

    Args:
        samples: path and label of every image, as torchvision's `ImageFolder.samples`.
        location: folder that `ids` are relative to.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], class_names: Sequence[str], location: str) -> None:
        super().__init__([label for _, label in samples], class_names, location)
        self._paths = [path for path, _ in samples]

    def load(self, index: int) -> Image.Image:
        return read_image(self._paths[index])

    @property
    def ids(self) -> list[str]:
        prefix = os.path.join(self.location, "")  # `relpath` takes 10 s for the 1.3 million images of ImageNet
        paths = (self._paths[index] for index in self.indices)
        return [
            path[len(prefix) :] if path.startswith(prefix) else os.path.relpath(path, self.location) for path in paths
        ]
