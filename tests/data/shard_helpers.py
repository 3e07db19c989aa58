"""Shards of small images whose grey value is their number, and how they are opened."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sequencer.config.schema import AugmentConfig, DataConfig
from sequencer.data import DataModule, open_split
from sequencer.data.shards import ShardSplit

webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
SIZES = (7, 3, 11, 1, 8)  # samples of the shards of the training split


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def write_split(folder: Path, split: str, sizes: tuple[int, ...]) -> None:
    """Image `n` of a split has the grey value `n` everywhere and the label n % 3."""
    first, shards = 0, []
    for number, size in enumerate(sizes):
        name = f"{split}-{number}.tar"
        with webdataset.TarWriter(str(folder / name)) as writer:
            for value in range(first, first + size):
                writer.write({"__key__": f"{value:05}", "png": png(value), "cls": str(value % 3)})
        shards.append({"url": name, "nsamples": size})
        first += size
    (folder / f"{split}.json").write_text(json.dumps({"shardlist": shards, "classes": ["a", "b", "c"]}))


def config(root: object, **changes: object) -> DataConfig:
    plain = {"img_size": 8, "mean": [0.0], "std": [1.0], "crop_pct": 1.0, "augment": AugmentConfig(), "num_workers": 0}
    changes = {"batch_size": 4, "eval_batch_size": 4, "shuffle_buffer": 5} | plain | changes
    return DataConfig(name="webdataset", root=str(root), **changes)  # type: ignore[arg-type]


def module(root: object, rank: int = 0, world_size: int = 1, **changes: object) -> DataModule:
    data = DataModule(config(root, **changes), seed=0, rank=rank, world_size=world_size)
    data.setup()
    return data


def val_split(root: object) -> ShardSplit:
    return open_split(config(root), "val", lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
