"""Splits of small sets, held decoded in memory, on a GPU where one trains.

Where the stored images have the size that the model takes and training needs no more than crops and flips, whole
batches are cropped, flipped and normalised at once, which gives the same pixels as one image at a time.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sequencer.config.schema import AugmentConfig, DataConfig
from sequencer.data.indexed import IndexedSplit
from sequencer.data.seeding import START, Key, Position, as_key, seeded_generator
from sequencer.data.split import CPU, limit_workers, make_fingerprint, make_loader
from sequencer.data.transforms import channel_statistics

LARGEST_SHARE = 0.25  # of a GPU's free memory that the images of one split may take


class MemorySplit(IndexedSplit):
    """Decoded images with labels.

    Args:
        data: eight-bit `N H W C` or `N H W`, or floats `N C H W` in [0, 1].

    Raises:
        ValueError: the images have another dtype, the numbers of images and labels differ, or a label is no index into
            `class_names`.
    """

    def __init__(
        self, data: np.ndarray | Tensor, labels: Sequence[int] | np.ndarray, class_names: Sequence[str], location: str
    ) -> None:
        super().__init__(labels, class_names, location)
        self.data = torch.as_tensor(data)
        if self.data.dtype != torch.uint8 and not self.data.is_floating_point():
            raise ValueError(f"its images have the dtype {self.data.dtype}")
        if len(self.data) != len(labels):
            raise ValueError(f"it has {len(self.data)} images and {len(labels)} labels")

    def load(self, index: int) -> Image.Image | Tensor:
        image = self.data[index]
        return image if image.is_floating_point() else Image.fromarray(image.numpy())

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the split by its number of images, their pixels and their labels."""
        pixels = (self.data[rows].numpy().tobytes() for rows in torch.from_numpy(self.indices).split(4096))
        return make_fingerprint(len(self), self.labels.tobytes(), *pixels)

    def training_loader(
        self,
        config: DataConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: Position = START,
        device: torch.device = CPU,
    ) -> DataLoader[Any]:
        if not self._has_size_of(config) or not crops_and_flips_only(config.augment):
            return super().training_loader(config, seed, rank, world_size, position, device)
        batches = MemoryTrainSet(StoredImages(self, config, self._device(device)), config.augment, seed)
        sampler = self.sampler(config, seed, rank, world_size, position)
        return _batch_loader(batches, config.batch_size // world_size, sampler, config)

    def evaluation_loader(
        self, config: DataConfig, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> DataLoader[Any]:
        if not self._has_size_of(config) or config.crop_pct != 1:
            return super().evaluation_loader(config, rank, world_size, device)
        stored = StoredImages(self, config, self._device(device))
        return _batch_loader(MemoryEvalSet(stored), config.eval_batch_size, range(rank, len(self), world_size), config)

    def readable_counts(self, num_workers: int) -> Iterable[int]:
        return [len(self)]

    def probe(self, most: int) -> tuple[int, list[str]]:
        return 0, []

    def _has_size_of(self, config: DataConfig) -> bool:
        """Whether the images are stored with the channels, height and width that the model takes."""
        return _to_floats(self.data[:1]).shape[1:] == (config.in_chans, config.img_size, config.img_size)

    def _device(self, device: torch.device) -> torch.device:
        """The given device if it is a GPU with room for the images, otherwise the CPU."""
        if device.type != "cuda":
            return CPU
        size = len(self) * self.data[:1].nbytes
        return device if size < LARGEST_SHARE * torch.cuda.mem_get_info(device)[0] else CPU


def crops_and_flips_only(augment: AugmentConfig) -> bool:
    """Whether images are augmented by nothing but padded crops and horizontal flips."""
    return not (augment.scale or augment.auto_augment or augment.color_jitter or augment.reprob)


class StoredImages:
    """The images of a split as they are stored, and their labels, on one device."""

    def __init__(self, split: MemorySplit, config: DataConfig, device: torch.device = CPU) -> None:
        self.device = device
        indices = torch.from_numpy(split.indices)
        if device == CPU:  # splits of one set share their storage
            self.data, self.rows = split.data, indices
        else:
            self.data, self.rows = split.data[indices].to(device), torch.arange(len(split), device=device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in channel_statistics(config))

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Int[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
        """Images with values in [0, 1]."""
        return _to_floats(self.data[self.rows[indices]])

    def normalise(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return (images - self.mean) / self.std


class MemoryEvalSet(Dataset[Any]):
    """Batches `[images, labels, indices]` by lists of indices."""

    def __init__(self, stored: StoredImages) -> None:
        self.stored = stored

    def __len__(self) -> int:
        return len(self.stored)

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        chosen = torch.tensor(indices)
        there = chosen.to(self.stored.device)
        return [self.stored.normalise(self.stored.images(there)), self.stored.labels[there], chosen]


class MemoryTrainSet(Dataset[Any]):
    """Batches `[images, labels]` by lists of keys (epoch, index) of one epoch.

    The crop and flip of an image are functions of (seed, epoch, index), the same on every device.
    """

    def __init__(self, stored: StoredImages, augment: AugmentConfig, seed: int) -> None:
        self.stored, self.augment, self.seed = stored, augment, seed
        self._epoch: int | None = None

    def __len__(self) -> int:
        return len(self.stored)

    def __getitems__(self, keys: Sequence[Key | int]) -> list[Tensor]:
        epochs, indices = zip(*map(as_key, keys), strict=True)
        (epoch,) = set(epochs)
        chosen = torch.tensor(indices, device=self.stored.device)
        images = self.stored.images(chosen)
        if self.augment.crop_padding or self.augment.hflip:
            self._draw(epoch)
            images = crop_and_flip(
                images, self._tops[chosen], self._lefts[chosen], self._flips[chosen], self.augment.crop_padding
            )
        return [self.stored.normalise(images), self.stored.labels[chosen]]

    def _draw(self, epoch: int) -> None:
        """Draws the crops and flips of all images on the CPU and moves them to the device, once per epoch."""
        if epoch == self._epoch:
            return
        generator = seeded_generator(f"{self.seed} {epoch} crops and flips")  # unrelated to the order of the epoch
        offsets = torch.randint(2 * self.augment.crop_padding + 1, (2, len(self)), generator=generator)
        flips = torch.rand(len(self), generator=generator) < self.augment.hflip
        self._tops, self._lefts = offsets.to(self.stored.device)
        self._flips = flips.to(self.stored.device)
        self._epoch = epoch


def crop_and_flip(
    images: Float[Tensor, "B C H W"],
    tops: Int[Tensor, " B"],
    lefts: Int[Tensor, " B"],
    flips: Bool[Tensor, " B"],
    padding: int,
) -> Float[Tensor, "B C H W"]:
    """Pads images with zeros, crops them to their size again, and mirrors some.

    Args:
        tops, lefts: first row and column of each crop in the padded image, from 0 to `2 * padding`.
        flips: images that are flipped horizontally after the crop.
    """
    B, _, H, W = images.shape
    rows = tops[:, None] + torch.arange(H, device=images.device)
    across = torch.arange(W, device=images.device).expand(B, W)
    columns = lefts[:, None] + torch.where(flips[:, None], across.flip(1), across)
    padded = F.pad(images, [padding] * 4)
    batch = torch.arange(B, device=images.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _batch_loader(
    batches: MemoryEvalSet | MemoryTrainSet, batch_size: int, sampler: Iterable[Any], config: DataConfig
) -> DataLoader[Any]:
    """A loader of whole batches; those on a GPU are made in the training process."""
    on_gpu = batches.stored.device != CPU
    return make_loader(
        batches, batch_size, sampler, 0 if on_gpu else limit_workers(config.num_workers), list, not on_gpu
    )


def _to_floats(data: Tensor) -> Float[Tensor, "B C H W"]:
    """Stored images, eight-bit `B H W C` or `B H W` or floats `B C H W`, as floats in [0, 1]."""
    if data.is_floating_point():
        return data
    data = data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2)
    return data.contiguous().float().div_(255)
