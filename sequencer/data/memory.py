"""Small sets, which are held decoded: their training images are cropped, flipped and normalised a batch at a time."""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from conf.schema import DataConfig
from sequencer.data.seeding import Key
from sequencer.data.sets import ImageSet
from sequencer.data.transforms import channel_statistics


def is_held(images: ImageSet, config: DataConfig) -> bool:
    """Whether `MemorySet` can do all that `config` asks for: the set is in memory, of the size and channels that are
    wanted, and is not augmented but by flips and by crops with padding."""
    augment = config.augment
    others = augment.scale or augment.auto_augment or augment.color_jitter or augment.reprob
    if others or not hasattr(images.source, "data"):
        return False
    return tuple(_floats(images.source.data[:1]).shape[1:]) == (config.in_chans, config.img_size, config.img_size)


class MemorySet(Dataset[Any]):
    """Batches `[images, labels]` for lists of keys (epoch, index), the same as one image at a time would be made.

    Where an image is cropped and whether it is flipped is drawn from (seed, epoch, index).
    """

    def __init__(self, images: ImageSet, config: DataConfig, seed: int) -> None:
        self.data, self.indices, self.labels = images.source.data, images.indices, torch.from_numpy(images.labels)
        self.augment, self.seed = config.augment, seed
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in channel_statistics(config))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: list[Key]) -> list[Tensor]:
        chosen = [index for _, index in keys]
        images = _floats(self.data[self.indices[chosen]])
        if self.augment.crop_padding or self.augment.hflip:
            images = self._moved(images, keys)
        return [(images - self.mean) / self.std, self.labels[chosen]]

    def _moved(self, images: Float[Tensor, "B C H W"], keys: list[Key]) -> Float[Tensor, "B C H W"]:
        """Cropped after padding with zeros, and flipped."""
        padding, (B, _, H, W) = self.augment.crop_padding, images.shape
        top, left, flipped = self._draw(keys).unbind(1)
        rows = top[:, None] + torch.arange(H)
        across = torch.arange(W).expand(B, W)
        columns = left[:, None] + torch.where(flipped[:, None] == 1, across.flip(1), across)
        padded = F.pad(images, [padding] * 4)
        return padded[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _draw(self, keys: list[Key]) -> Int[Tensor, "B 3"]:
        """First row, first column, and 1 where the image is flipped."""
        drawn = []
        for epoch, index in keys:
            generator = random.Random(f"{self.seed} {epoch} {index}")
            offsets = [generator.randint(0, 2 * self.augment.crop_padding) for _ in range(2)]
            drawn.append([*offsets, int(generator.random() < self.augment.hflip)])
        return torch.tensor(drawn)


def _floats(data: np.ndarray | Tensor) -> Float[Tensor, "B C H W"]:
    """CIFAR's eight-bit `B H W C`, MNIST's eight-bit `B H W` or the digits' floats `B 1 H W` as floats in 0..1."""
    images = torch.as_tensor(data)
    if images.is_floating_point():
        return images
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous().float().div_(255)
