"""Images as a piece of an evaluation of robustness has them: clean, corrupted, or stored corrupted.

All images are in [0, 1], `C H W`, for `sequencer.analysis.robustness.Normalised`.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, Resize

from sequencer.analysis.corruptions import CORRUPTIONS, SEVERITIES, corrupt, to_pil
from sequencer.analysis.robustness import ALEXNET_ERRORS
from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data import eval_transform
from sequencer.data.indexed import IndexedSplit, ReadableSet, collate_readable
from sequencer.data.split import limit_workers, make_loader
from sequencer.data.transforms import to_8bit, to_channels
from sequencer.printing import printable

Prepare = Callable[[Any, int], Tensor]  # from a stored image and its index to the image in [0, 1], `C H W`


def unit_transform(config: DataConfig) -> Compose:
    """The transform of evaluation without its normalisation: images in [0, 1]."""
    return eval_transform(replace(config, mean=[0.0], std=[1.0]))


class Clean:
    """Prepares images as evaluation does, without the normalisation."""

    def __init__(self, config: DataConfig) -> None:
        self.transform = unit_transform(config)

    def __call__(self, image: Any, index: int) -> Tensor:
        return self.transform(image)


class CifarC:
    """Corrupts images by `corruptions.corrupt`.

    A stored image that is not larger than the model's input is corrupted as it is stored, like those of CIFAR-10-C;
    any other is resized and cropped first.
    """

    def __init__(self, config: DataConfig, name: str, severity: int, seed: int) -> None:
        self.transform, self.config = unit_transform(config), config
        self.name, self.severity, self.seed = name, severity, seed

    def __call__(self, image: Any, index: int) -> Tensor:
        stored: Any = to_channels(to_8bit(image), self.config.in_chans)
        small = min(stored.size) <= self.config.img_size
        pixels = np.asarray(CenterCrop(min(stored.size))(stored) if small else to_8bit(self.transform(stored)))
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        corrupted = corrupt(pixels, self.name, self.severity, self.seed, index)
        return self.transform(to_pil(corrupted))


class ImageNetC:
    """Corrupts images as ImageNet-C has them, by the package `imagecorruptions-imaug`.

    As published, an image is resized to 256 pixels, cropped to 224, corrupted and stored as JPEG of quality 85; the
    model sees all of it (a `crop_pct` of 1).
    """

    def __init__(self, config: DataConfig, name: str, severity: int, seed: int) -> None:
        self.transform = unit_transform(replace(config, crop_pct=1.0))
        self.geometry = Compose([Resize(256), CenterCrop(224)])
        self.name, self.severity, self.seed = name, severity, seed

    def __call__(self, image: Any, index: int) -> Tensor:
        from imagecorruptions import corrupt as corrupt_imagenet  # an optional package, which takes seconds to import

        pixels = np.asarray(self.geometry(to_8bit(image).convert("RGB")))
        number = list(ALEXNET_ERRORS).index(self.name)
        words = np.random.SeedSequence([self.seed, number, self.severity, index]).generate_state(2)
        # these two do not draw from NumPy's global state
        own = {"seed": int(words[1])} if self.name in ("impulse_noise", "glass_blur") else {}
        with seeded_numpy(int(words[0])):
            corrupted = corrupt_imagenet(pixels, self.severity, self.name, **own)
        buffer = io.BytesIO()
        Image.fromarray(corrupted).save(buffer, "JPEG", quality=85)
        with Image.open(buffer) as stored:
            return self.transform(stored)


@contextmanager
def seeded_numpy(seed: int) -> Iterator[None]:
    """Seeds NumPy's global random state inside the block and restores it afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


class PieceSet(ReadableSet):
    """The readable images of a split, prepared for a piece."""

    def __init__(self, split: IndexedSplit, prepare: Prepare) -> None:
        super().__init__(split)
        self.prepare = prepare

    def item(self, index: int) -> tuple[Tensor, int]:
        image, label = self.split.decode(index)
        return self.prepare(image, index), label


class StoredSplit(IndexedSplit):
    """The images of one severity in an array of CIFAR-10-C, which is read from the disk as it is needed."""

    def __init__(
        self,
        path: Path,
        labels: NDArray[np.integer[Any]],
        severity: int,
        class_names: Sequence[str],
        limit: int | None = None,
    ) -> None:
        """Opens an array.

        Args:
            path: `NAME.npy`, uint8 `N H W 3`, a fifth of which are of each severity.
            labels: `N`, the content of `labels.npy`.
            severity: From 1 to 5.
            class_names: Names of the classes that the labels are indices into.
            limit: Take the first images of the severity only.

        Raises:
            RequestError: The array has another layout.
        """
        try:
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
            if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[-1] != 3:
                raise ValueError(f"it holds {self.array.dtype} of shape {self.array.shape}, not uint8 N H W 3")
            if len(self.array) != len(labels) or len(labels) % len(SEVERITIES):
                raise ValueError(f"it has {len(self.array):,} images, and labels.npy has {len(labels):,} labels")
            super().__init__(labels, class_names, str(path))
        except (OSError, ValueError) as error:
            raise RequestError(f"{printable(path)}: {printable(error)}") from error
        number = len(labels) // len(SEVERITIES)
        first = (severity - 1) * number
        self.indices = np.arange(first, first + min(number, limit or number))

    def load(self, index: int) -> Image.Image:
        """The stored image `index`."""
        return Image.fromarray(np.array(self.array[index]))


def read_stored_labels(folder: Path) -> NDArray[np.integer[Any]]:
    """Reads `labels.npy` of CIFAR-10-C.

    Raises:
        RequestError: It is missing or has no integers.
    """
    path = folder / "labels.npy"
    try:
        labels = np.load(path, allow_pickle=False)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"it holds {labels.dtype} of shape {labels.shape}, not N integers")
    except (OSError, ValueError) as error:
        raise RequestError(f"{printable(path)}: {printable(error)}") from error
    return labels


def stored_corruptions(folder: Path) -> list[str]:
    """Names of the corruptions that a folder holds as `NAME.npy`; those of CIFAR-10-C first, in their order.

    Raises:
        RequestError: There is none.
    """
    names = {path.stem for path in folder.glob("*.npy")} - {"labels"}
    if not names:
        raise RequestError(f"--stored {printable(folder)}: there is no array such as gaussian_noise.npy")
    return [name for name in ALEXNET_ERRORS if name in names] + sorted(names - ALEXNET_ERRORS.keys())


def piece_loader(split: IndexedSplit, prepare: Prepare, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Batches of images in [0, 1] `B C H W`, labels and indices of a piece."""
    workers = limit_workers(num_workers)
    return make_loader(PieceSet(split, prepare), batch_size, range(len(split)), workers, collate_readable)


KINDS: dict[str, tuple[list[str], type[CifarC] | type[ImageNetC]]] = {
    "cifar": (list(CORRUPTIONS), CifarC),
    "imagenet": (list(ALEXNET_ERRORS), ImageNetC),
}
