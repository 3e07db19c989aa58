"""Data sets, their transforms and the DataModule that serves them."""

from typing import TYPE_CHECKING, Any

from sequencer.data.files import FileSplit
from sequencer.data.images import UnreadableImage, read_image
from sequencer.data.indexed import IndexedSplit
from sequencer.data.memory import MemorySplit
from sequencer.data.mixing import build_mixup
from sequencer.data.quarantine import Quarantine, TooManyBadImages
from sequencer.data.sets import DATA_SETS, DataSet, add_data_set, has_test_split, open_split
from sequencer.data.shards import ShardSplit
from sequencer.data.split import Split, SplitName
from sequencer.data.transforms import channel_statistics, eval_transform, resized_side, train_transform

if TYPE_CHECKING:
    from sequencer.data.module import DataModule

__all__ = [
    "DATA_SETS",
    "DataModule",
    "DataSet",
    "FileSplit",
    "IndexedSplit",
    "MemorySplit",
    "Quarantine",
    "ShardSplit",
    "Split",
    "SplitName",
    "TooManyBadImages",
    "UnreadableImage",
    "add_data_set",
    "build_mixup",
    "channel_statistics",
    "eval_transform",
    "has_test_split",
    "open_split",
    "read_image",
    "resized_side",
    "train_transform",
]


def __getattr__(name: str) -> Any:
    """Imports the `DataModule` where it is used: Lightning takes seconds to import, and evaluation does without it."""
    if name != "DataModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sequencer.data.module import DataModule

    return DataModule
