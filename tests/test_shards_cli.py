"""scripts/shards.py: the shards that it writes and indexes hold the images of the folder."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequencer.config.schema import DataConfig
from sequencer.data import open_split
from sequencer.data.shard_files import read_samples

pytest.importorskip("webdataset", reason="webdataset is not installed")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Seven images of cats and five of dogs to train, one of each to validate."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for split, counts in (("train", {"cat": 7, "dog": 5}), ("val", {"cat": 1, "dog": 1})):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(256, size=(9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def test_written_shards_hold_every_file(load_script, photos, tmp_path, capsys):
    script = load_script("shards")
    assert script.main(["write", str(photos), "--output", str(tmp_path / "out"), "--images", "5"]) == 0
    assert capsys.readouterr().out == "train: 12 images in 3 shards\nval: 2 images in 1 shards\n"
    split = open_split(DataConfig(name="webdataset", root=str(tmp_path / "out")), "train", lambda image: image)
    assert split.class_names == ["cat", "dog"]
    shards = [list(read_samples(url)) for url in split.urls]
    assert [len(samples) for samples in shards] == [5, 5, 2]
    assert np.diff(split.starts).tolist() == [5, 5, 2]
    expected = {path.read_bytes(): path.parent.name for path in photos.glob("train/*/*.png")}
    assert {sample.file: split.class_names[sample.label] for samples in shards for sample in samples} == expected
    assert {sample.label for sample in shards[0]} == {0, 1}  # the samples are shuffled, not sorted by class


def test_class_names_that_are_not_utf8_are_read_back(load_script, photos, tmp_path):
    name, source = os.fsdecode(b"d\xffg"), shutil.copytree(photos, tmp_path / "photos")
    for split in ("train", "val"):
        (source / split / "dog").rename(source / split / name)
    assert load_script("shards").main(["write", str(source), "--output", str(tmp_path / "out")]) == 0
    config = DataConfig(name="webdataset", root=str(tmp_path / "out"))
    assert open_split(config, "train", lambda image: image).class_names == ["cat", name]


def test_the_index_of_existing_shards(load_script, photos, tmp_path, capsys):
    script = load_script("shards")
    script.main(["write", str(photos), "--output", str(tmp_path / "out"), "--images", "5"])
    for name, options in (("train", []), ("val", ["--split", "val"])):
        index = tmp_path / "out" / f"{name}.json"
        before = json.loads(index.read_text())
        index.unlink()
        names = tmp_path / "names.txt"
        names.write_text("cat\ndog\n")
        pattern = str(tmp_path / "out" / f"{name}-*.tar")
        assert script.main(["index", pattern, "--classes", str(names), *options]) == 0
        assert json.loads(index.read_text()) == before


def test_what_cannot_be_written_or_indexed_is_refused(load_script, photos, tmp_path, capsys):
    script = load_script("shards")
    source = Path(shutil.copytree(photos, tmp_path / "photos"))
    os.mkfifo(source / "val" / "cat" / "fifo\x1b.png")
    assert script.main(["write", str(source), "--output", str(tmp_path / "out")]) == 2
    assert "fifo\\x1b.png: a device, FIFO or socket, no regular file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "damaged.tar").write_text("no tar file")
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    with tarfile.open(tmp_path / "many.tar", "w") as tar:
        member = tarfile.TarInfo("0.cls")
        member.size = 9
        tar.addfile(member, io.BytesIO(b"999999999"))
    for name, message in (
        ("pipe", "no regular file"),
        ("damaged", "damaged.tar cannot be read"),
        ("empty", "holds no sample"),
        ("many", "sample 0 has no .cls file with a number below 1000000"),
    ):
        assert script.main(["index", str(tmp_path / f"{name}.tar")]) == 2
        assert message in capsys.readouterr().err


def test_a_cycle_of_links_adds_no_sample(load_script, photos, tmp_path, capsys):
    source = Path(shutil.copytree(photos, tmp_path / "photos"))
    (source / "train" / "cat" / "loop").symlink_to("..")
    assert load_script("shards").main(["write", str(source), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("train: 12 images")


def test_classes_without_names_are_numbered(load_script, photos, tmp_path, capsys):
    script = load_script("shards")
    script.main(["write", str(photos), "--output", str(tmp_path / "out")])
    assert script.main(["index", str(tmp_path / "out" / "train-*.tar")]) == 0
    assert json.loads((tmp_path / "out" / "train.json").read_text())["classes"] == ["0", "1"]
    (tmp_path / "names.txt").write_text("cat")
    arguments = ["index", str(tmp_path / "out" / "train-*.tar"), "--classes", str(tmp_path / "names.txt")]
    assert script.main(arguments) == 2
    assert "names 1 classes, labels go up to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["write", "nowhere", "--output", "out"], "nowhere has no folder train/"),
        (["index", "nowhere-*.tar"], "nowhere-*.tar: there is no such file"),
        (["index", "\x1b*.tar"], r"\x1b*.tar: there is no such file"),
    ],
)
def test_wrong_requests(load_script, arguments, message, capsys, tmp_path):
    assert load_script("shards").main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
