import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequencer.config.composition import compose
from sequencer.config.schema import AugmentConfig, DataConfig


@pytest.fixture
def digits() -> DataConfig:
    return DataConfig(name="digits", in_chans=1, img_size=8, mean=[0.0], std=[1.0], batch_size=100, num_workers=0)


@pytest.fixture(scope="session")
def write_noise() -> Callable[..., Path]:
    """`write_noise(path, seed=0, size=(20, 16))` writes an RGB image of noise; `size` is (width, height)."""

    def write(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory, write_noise) -> Path:
    """An image folder with the classes ants and bees: 12 images of each to train, 6 to validate. Not to be changed."""
    root = tmp_path_factory.mktemp("folder")
    for split, images in (("train", 24), ("val", 12)):
        for number in range(images):
            write_noise(root / split / ("ants", "bees")[number % 2] / f"{number:02}.png", seed=number)
    return root


@pytest.fixture
def in_memory(made_root) -> Callable[..., DataConfig]:
    """`in_memory(name, augment)` configures a set with few images, of its own size and statistics."""

    def build(name: str, augment: AugmentConfig | None = None) -> DataConfig:
        config = compose([f"data={name}", f"data.root={made_root}", "data.num_workers=0"]).data
        return replace(config, augment=augment or AugmentConfig(), batch_size=8)

    return build


@pytest.fixture(scope="session")
def shards_root(tmp_path_factory) -> Path:
    """A set in shards, as `shard_helpers.write_split` writes it. Not to be changed."""
    from tests.data.shard_helpers import SIZES, write_split  # skips the test without webdataset

    root = tmp_path_factory.mktemp("shards")
    write_split(root, "train", SIZES)
    write_split(root, "val", (5, 4))
    return root


@pytest.fixture
def shards_copy(shards_root, tmp_path) -> Path:
    """A copy of `shards_root` that may be changed."""
    return Path(shutil.copytree(shards_root, tmp_path / "shards"))
