"""Small sets, which are held decoded, on the GPU where one trains: their images are cropped, flipped and normalised
a batch at a time."""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from sequencer.config.schema import DataConfig
from sequencer.data.seeding import Key
from sequencer.data.sets import ImageSet
from sequencer.data.shards import ShardSet
from sequencer.data.transforms import channel_statistics

CPU = torch.device("cpu")
LARGEST_SHARE = 0.25  # of a GPU's free memory


def is_held(images: ImageSet | ShardSet, config: DataConfig) -> bool:
    """Whether the set is in memory, of the size and channels that are wanted."""
    if isinstance(images, ShardSet) or not hasattr(images.source, "data"):
        return False
    return tuple(_floats(images.source.data[:1]).shape[1:]) == (config.in_chans, config.img_size, config.img_size)


def can_augment(config: DataConfig) -> bool:
    """Whether the training images are augmented by nothing but flips and crops with padding."""
    augment = config.augment
    return not (augment.scale or augment.auto_augment or augment.color_jitter or augment.reprob)


def fits(images: ImageSet | ShardSet, device: torch.device) -> bool:
    """Whether a device has room for the images of the set."""
    if device.type != "cuda":
        return device.type == "cpu"
    assert isinstance(images, ImageSet)
    return images.source.data.nbytes < LARGEST_SHARE * torch.cuda.mem_get_info(device)[0]


class Held:
    """The images of a part, as they are stored, and their labels, on `device`."""

    def __init__(self, images: ImageSet, config: DataConfig, device: torch.device = CPU) -> None:
        # on the CPU the parts of a set share their source, elsewhere each has its own images
        own = slice(None) if device == CPU else images.indices
        self.data = torch.as_tensor(images.source.data[own]).to(device)
        self.rows = torch.from_numpy(images.indices) if device == CPU else torch.arange(len(images), device=device)
        self.labels = torch.from_numpy(images.labels).to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in channel_statistics(config))

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Int[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
        """In 0..1."""
        return _floats(self.data[self.rows[indices]])

    def normalise(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return (images - self.mean) / self.std


class MemoryEvalSet(Dataset[Any]):
    """Batches `[images, labels, indices]` for lists of indices."""

    def __init__(self, held: Held) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        chosen = torch.tensor(indices, device=self.held.rows.device)
        return [self.held.normalise(self.held.images(chosen)), self.held.labels[chosen], torch.tensor(indices)]


class MemorySet(Dataset[Any]):
    """Batches `[images, labels]` for lists of keys (epoch, index), the same as one image at a time would be made.

    Where an image is cropped and whether it is flipped is a function of (seed, epoch, index), the same on every device.
    """

    def __init__(self, held: Held, config: DataConfig, seed: int) -> None:
        self.held, self.augment = held, config.augment
        self.seed = random.Random(str(seed)).getrandbits(62)  # neighbouring seeds have nothing in common

    def __len__(self) -> int:
        return len(self.held)

    def __getitems__(self, keys: list[Key]) -> list[Tensor]:
        epochs, indices = torch.tensor(keys, device=self.held.rows.device).unbind(1)
        images = self.held.images(indices)
        if self.augment.crop_padding or self.augment.hflip:
            images = self._moved(images, _mix(_mix(self.seed + epochs * GOLDEN) + indices * GOLDEN))
        return [self.held.normalise(images), self.held.labels[indices]]

    def _moved(self, images: Float[Tensor, "B C H W"], states: Int[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
        """Cropped after padding with zeros, and flipped."""
        padding, (B, _, H, W) = self.augment.crop_padding, images.shape
        first = states + GOLDEN
        second = first + GOLDEN
        top, left = (_positive(_mix(state)) % (2 * padding + 1) for state in (first, second))
        flipped = _positive(_mix(second + GOLDEN)).double() / 2**63 < self.augment.hflip
        rows = top[:, None] + torch.arange(H, device=images.device)
        across = torch.arange(W, device=images.device).expand(B, W)
        columns = left[:, None] + torch.where(flipped[:, None], across.flip(1), across)
        padded = F.pad(images, [padding] * 4)
        batch = torch.arange(B, device=images.device)[:, None, None]
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2714064.2660195), whose 64-bit numbers int64 holds as they wrap
GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mix(x: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """64 bits that have little to do with those of `x`."""
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _shift(x: Int[Tensor, " B"], bits: int) -> Int[Tensor, " B"]:
    """To the right, with zeros coming in, where `>>` repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _positive(x: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The upper 63 bits."""
    return _shift(x, 1)


def _floats(data: np.ndarray | Tensor) -> Float[Tensor, "B C H W"]:
    """CIFAR's eight-bit `B H W C`, MNIST's eight-bit `B H W` or the digits' floats `B 1 H W` as floats in 0..1."""
    images = torch.as_tensor(data)
    if images.is_floating_point():
        return images
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous().float().div_(255)
