"""Data sets, their transforms and the DataModule that serves them."""

from sequencer.data.images import UnreadableImage, read_image
from sequencer.data.mixing import build_mixup
from sequencer.data.module import DataModule, evaluation_loader
from sequencer.data.quarantine import Quarantine, TooManyBadImages
from sequencer.data.readable import ReadableSet, check_images, collate_readable
from sequencer.data.sets import FILE_SETS, ImageSet, open_dataset
from sequencer.data.shards import ShardSet
from sequencer.data.transforms import channel_statistics, eval_transform, train_transform

__all__ = [
    "FILE_SETS",
    "DataModule",
    "ImageSet",
    "Quarantine",
    "ReadableSet",
    "ShardSet",
    "TooManyBadImages",
    "UnreadableImage",
    "build_mixup",
    "channel_statistics",
    "check_images",
    "collate_readable",
    "eval_transform",
    "evaluation_loader",
    "open_dataset",
    "read_image",
    "train_transform",
]
