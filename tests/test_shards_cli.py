"""scripts/shards.py: shards that are written and listed are the ones that were there."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sequencer.config.schema import DataConfig
from sequencer.data.shards import ShardSet, read_samples

pytest.importorskip("webdataset", reason="webdataset is not installed")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven images of cats and five of dogs to train, one of each to validate."""
    random = np.random.RandomState(0)
    for part, counts in (("train", {"cat": 7, "dog": 5}), ("val", {"cat": 1, "dog": 1})):
        for name, count in counts.items():
            for number in range(count):
                path = tmp_path / "photos" / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.randint(256, size=(9, 9, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_written_shards_hold_every_file(load_script, photos, tmp_path, capsys):
    script = load_script("shards")
    assert script.main(["write", str(photos), "--output", str(tmp_path / "out"), "--images", "5"]) == 0
    assert capsys.readouterr().out == "train: 12 images in 3 shards\nval: 2 images in 1 shards\n"
    images = ShardSet(DataConfig(name="webdataset", root=str(tmp_path / "out")), "train", lambda image: image)
    assert images.class_names == ["cat", "dog"]
    assert len(images) == 12
    written = [sample for url in images.urls for sample in read_samples(url)]
    expected = {path.read_bytes(): path.parent.name for path in photos.glob("train/*/*.png")}
    assert {file: images.class_names[label] for file, label, _ in written} == expected
    assert {label for _, label, _ in read_samples(images.urls[0])} == {0, 1}  # not in the order of the classes


def test_an_index_of_shards_that_there_are(load_script, photos, tmp_path, capsys):
    script = load_script("shards")
    script.main(["write", str(photos), "--output", str(tmp_path / "out"), "--images", "5"])
    before = json.loads((tmp_path / "out" / "train.json").read_text())
    (tmp_path / "out" / "train.json").unlink()
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    assert script.main(["index", str(tmp_path / "out" / "train-*.tar"), "--classes", str(names)]) == 0
    assert json.loads((tmp_path / "out" / "train.json").read_text()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["write", "nowhere", "--output", "out"], "nowhere has no folder train/"),
        (["index", "nowhere-*.tar"], "nowhere-*.tar: there is no such file"),
    ],
)
def test_wrong_requests(load_script, arguments, message, capsys, tmp_path):
    assert load_script("shards").main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
