"""Evaluation on what can be read."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sequencer.data.images import UnreadableImage
from sequencer.data.sets import FILE_SETS, ImageSet
from sequencer.data.shards import ShardSet, StreamSet, Stretches


class ReadableSet(Dataset[Any]):
    """A set as items `(image, label, index)`, whose unreadable images are left out of their batches; served with
    `collate_readable`."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        items = (self._item(index) for index in indices)
        return [item for item in items if item is not None]

    def _item(self, index: int) -> Any:
        try:
            return *self.images[index], index
        except UnreadableImage:
            return None


def collate_readable(items: list[Any]) -> list[Tensor]:
    """Images `B C H W`, labels `B` and indices `B`; of no elements where nothing could be read."""
    none = torch.empty(0, dtype=torch.int64)
    return default_collate(items) if items else [torch.empty(0), none, none]


class _Decoding(ReadableSet):
    def _item(self, index: int) -> Any:
        try:
            self.images.decode(index)
        except UnreadableImage:
            return None
        return torch.empty(0), 0


def _decoding(images: ImageSet | ShardSet, num_workers: int) -> tuple[Dataset[Any], Any]:
    if not isinstance(images, ShardSet):
        return _Decoding(images), range(len(images))
    plain = copy.copy(images)
    plain.transform = lambda image: 0
    return StreamSet(Stretches(plain, len(plain), 64, num_workers, buffer=64)), [
        (0, index) for index in range(len(plain))
    ]


def check_images(name: str, parts: dict[str, ImageSet | ShardSet], num_workers: int, show_progress: bool) -> int:
    """Decodes every image of every part; returns how many could be read.

    Raises:
        TooManyBadImages: more cannot be read than the quarantine of a part allows.
    """
    if name not in (*FILE_SETS, "webdataset"):
        return sum(len(images) for images in parts.values())  # in memory since they were opened
    readable = 0
    for part, images in parts.items():
        decoding, order = _decoding(images, num_workers)
        loader = DataLoader(decoding, 64, sampler=order, num_workers=num_workers, collate_fn=len)
        readable += sum(track(loader, f"checking {part} images", transient=True, disable=not show_progress))
    return readable
