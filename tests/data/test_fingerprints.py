"""The fingerprints of splits, which a checkpoint holds."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequencer.config import DataConfig
from sequencer.data import DataModule
from sequencer.data.files import FileSplit
from sequencer.data.memory import MemorySplit
from sequencer.data.sets import open_split
from sequencer.data.shards import ShardSplit
from sequencer.data.split import Split, unchanged
from tests.helpers import DIGITS

NAMES = ("ant/0.png", "ant/1.png", "bee/0.png", "bee/deep/er.png")


def image_folder(root: Path, names: tuple[str, ...] = NAMES) -> Split:
    for name in names:
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return open_split(DataConfig(name="imagefolder", root=str(root)), "train", unchanged)


def test_an_image_folder_is_the_same_wherever_and_in_whatever_order_it_is_written(tmp_path):
    first = image_folder(tmp_path / "a")
    second = image_folder(tmp_path / "some" / "where" / "else", NAMES[::-1])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    third = open_split(DataConfig(name="imagefolder", root=str(tmp_path / "link")), "train", unchanged)
    assert first.fingerprint == second.fingerprint == third.fingerprint
    assert first.fingerprint.startswith("4 images ")


def test_names_labels_and_number_of_images_count(tmp_path):
    samples = [("/d/a.png", 0), ("/d/b.png", 1)]
    changed = [
        samples,
        samples[:1],
        samples[::-1],
        [("/d/a.png", 1), ("/d/b.png", 0)],
        [("/d/a.png", 0), ("/d/c.png", 1)],
        [("/d/a.png\0b.png", 0)],
    ]
    assert len({FileSplit(files, ["x", "y"], "/d").fingerprint for files in changed}) == len(changed)


def test_a_name_that_is_not_utf8(tmp_path):
    split = FileSplit([(os.fsdecode(b"/d/\xff.png"), 0)], ["x"], "/d")
    assert split.fingerprint.startswith("1 images ")


def test_files_outside_the_folder_have_relative_names():
    assert FileSplit([("/e/a.png", 0), ("/d/a.png", 0)], ["x"], "/d").ids == ["../e/a.png", "a.png"]


def test_a_subset_has_a_fingerprint_of_its_own():
    data = DataModule(DIGITS, 0)
    data.setup()
    assert len(set(data.fingerprints.values())) == 3
    again = DataModule(DIGITS, 1)
    again.setup()
    assert again.fingerprints == data.fingerprints
    other = DataModule(replace(DIGITS, val_fraction=0.2), 0)
    other.setup()
    assert other.fingerprints["train"] != data.fingerprints["train"]
    assert other.fingerprints["test"] == data.fingerprints["test"]
    part = data.splits["test"].subset(np.arange(5))  # of a split whose own fingerprint has been read
    assert part.fingerprint.startswith("5 images ")


def test_the_pixels_of_images_in_memory_count():
    images = np.zeros((5000, 2, 2), dtype=np.uint8)
    split = MemorySplit(images, np.zeros(5000), ["x"], "memory")
    altered = images.copy()
    altered[4999, 1, 1] = 1
    relabelled = MemorySplit(images, np.arange(5000) == 7, ["x", "y"], "memory")
    prints = {s.fingerprint for s in (split, relabelled, MemorySplit(altered, np.zeros(5000), ["x"], "memory"))}
    assert len(prints) == 3


def test_shards_are_identified_by_their_index(tmp_path):
    def fingerprint(root: Path, *shards: tuple[str, int]) -> str:
        root.mkdir(parents=True, exist_ok=True)
        listed = [{"url": url, "nsamples": count} for url, count in shards]
        (root / "train.json").write_text(json.dumps({"shardlist": listed, "classes": ["x", "y"]}))
        return ShardSplit(DataConfig(name="webdataset", root=str(root)), "train").fingerprint

    pytest.importorskip("webdataset")
    first = fingerprint(tmp_path / "a", ("0.tar", 3), ("1.tar", 2))
    assert first == fingerprint(tmp_path / "b", ("0.tar", 3), ("1.tar", 2))
    assert first == fingerprint(tmp_path / "c", (f"{tmp_path}/b/0.tar", 3), (f"{tmp_path}/b/1.tar", 2))
    others = [[("0.tar", 2), ("1.tar", 3)], [("1.tar", 3), ("0.tar", 2)], [("0.tar", 5)], [("0.tar", 3), ("2.tar", 2)]]
    assert len({first, *(fingerprint(tmp_path / "a", *other) for other in others)}) == 5


def test_imagenet_takes_little_time():
    samples = [
        (f"/data/imagenet/train/n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG", i // 1300) for i in range(1_281_167)
    ]
    split = FileSplit(samples, [str(i) for i in range(1000)], "/data/imagenet/train")
    start = time.process_time()
    assert split.fingerprint.startswith("1281167 images ")
    assert time.process_time() - start < 3
