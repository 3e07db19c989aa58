"""Small files in the layouts of torchvision's sets."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from conf.schema import DataConfig


@pytest.fixture
def digits() -> DataConfig:
    return DataConfig(name="digits", in_chans=1, img_size=8, mean=[0.0], std=[1.0], batch_size=100, num_workers=0)


@pytest.fixture
def made_root(tmp_path, monkeypatch):
    """MNIST, Fashion-MNIST and CIFAR-100 with few images: every class 10 times in training, once in the test part."""
    for name in ("MNIST", "FashionMNIST"):
        folder = tmp_path / name / "raw"
        folder.mkdir(parents=True)
        write_idx(folder, "train", np.repeat(np.arange(10), 10))
        write_idx(folder, "t10k", np.arange(10))
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    files = {
        "train": cifar_batch(np.repeat(np.arange(100), 10)),
        "test": cifar_batch(np.arange(100)),
        "meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
    }
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    checksums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in files}
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", checksums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", checksums["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": checksums["meta"]})
    return tmp_path


def write_idx(folder: Path, part: str, labels: np.ndarray) -> None:
    """Images whose every pixel is the label times 20, in MNIST's format (big-endian header, then bytes)."""
    images = np.broadcast_to((labels * 20)[:, None, None], (len(labels), 28, 28)).astype(np.uint8)
    header = np.array([0x0803, *images.shape], dtype=">i4").tobytes()
    (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = np.array([0x0801, len(labels)], dtype=">i4").tobytes()
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())


def cifar_batch(labels: np.ndarray) -> dict:
    """Images whose every value is the label."""
    return {"data": np.repeat(labels.astype(np.uint8)[:, None], 3072, axis=1), "fine_labels": labels.tolist()}
