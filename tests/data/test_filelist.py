"""Lists of image files: which rows make which split, what identifies them, and errors that name the line."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from sequencer.config import RequestError, compose
from sequencer.data import DataModule, has_test_split, open_split

ANIMALS = ["ant", "bee", "cat"]


def image_of(index: int) -> str:
    return f"images/{index:02}.png"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Thirty images below `images/`, whose grey value is their number."""
    (tmp_path / "images").mkdir()
    for index in range(30):
        Image.new("RGB", (9, 8), (index,) * 3).save(tmp_path / image_of(index))
    return tmp_path


def rows(parts: str = "") -> list[list[str]]:
    """Ten images of each animal in turn; `parts` are the splits of the first ones, the others are for training."""
    names = [{"t": "test", "v": "val"}.get(part, "train") for part in parts.ljust(30, "-")]
    listed = [[image_of(index), ANIMALS[index % 3], names[index]] for index in range(30)]
    return listed if parts else [row[:2] for row in listed]


def write_csv(path: Path, header: str, listed: list[list[str]]) -> Path:
    path.write_text("\n".join([header, *(",".join(row) for row in listed)]) + "\n")
    return path


def opened(path: Path, *overrides: str):
    """The splits of a list, by name."""
    config = compose(["data=filelist", f"data.root={path}", *overrides]).data
    names = ["train", "val", *(["test"] if has_test_split(config) else [])]
    return {name: open_split(config, name, lambda image: image) for name in names}


def test_a_share_of_every_class_is_held_out(folder):
    splits = opened(write_csv(folder / "list.csv", "path,label", rows()), "data.val_fraction=0.2")
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "val": 6}
    assert np.bincount(splits["val"].labels).tolist() == [2, 2, 2]
    assert sorted(splits["train"].ids + splits["val"].ids) == [image_of(index) for index in range(30)]
    assert splits["val"].class_names == ANIMALS
    image, label = splits["train"][5]
    assert image_of(image.getpixel((0, 0))[0]) == splits["train"].ids[5]
    assert label == image.getpixel((0, 0))[0] % 3


def test_a_share_can_be_tested(folder):
    path = write_csv(folder / "list.csv", "path,label", rows())
    splits = opened(path, "data.val_fraction=0.2", "data.test_fraction=0.5")
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "val": 3, "test": 15}
    assert len({name for split in splits.values() for name in split.ids}) == 30


def test_a_column_names_the_splits(folder):
    splits = opened(write_csv(folder / "list.csv", "path,label,split", rows("tttvvv")))
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "val": 3, "test": 3}
    assert splits["test"].ids == [image_of(0), image_of(1), image_of(2)]
    assert splits["val"].ids == [image_of(3), image_of(4), image_of(5)]


def test_a_list_may_name_only_the_test_images(folder):
    splits = opened(write_csv(folder / "list.csv", "path,label,split", rows("ttt")), "data.val_fraction=0.34")
    assert {name: len(split) for name, split in splits.items()} == {"train": 18, "val": 9, "test": 3}


def test_columns_can_have_other_names_and_be_ignored(folder):
    path = write_csv(folder / "list.csv", "file,species,split", rows("ttt"))
    columns = ["data.path_column=file", "data.label_column=species"]
    assert len(opened(path, *columns)["test"]) == 3
    assert "test" not in opened(path, *columns, "data.split_column=null")


def test_a_parquet_file_is_read_as_a_csv_file(folder):
    listed = rows("tttvvv")
    table = pyarrow.table(dict(zip(("path", "label", "split"), zip(*listed, strict=True), strict=True)))
    pyarrow.parquet.write_table(table, folder / "list.parquet", row_group_size=7)
    csv_splits = opened(write_csv(folder / "list.csv", "path,label,split", listed))
    for name, split in opened(folder / "list.parquet").items():
        assert split.fingerprint == csv_splits[name].fingerprint


def test_integers_are_sorted_by_value(folder):
    table = pyarrow.table({"path": [image_of(index) for index in range(30)], "label": [2, 10, 9] * 10})
    pyarrow.parquet.write_table(table, folder / "list.parquet")
    assert opened(folder / "list.parquet")["train"].class_names == ["2", "9", "10"]


def test_the_fingerprint_covers_the_list_wherever_it_lies(folder):
    path = write_csv(folder / "list.csv", "path,label", rows())
    first = opened(path)["train"].fingerprint
    moved = shutil.copytree(folder, folder / "moved")
    assert opened(moved / "list.csv")["train"].fingerprint == first
    changed = rows()
    changed[0][1] = "bee"
    write_csv(path, "path,label", changed)
    os.utime(path, ns=(1, 1))
    assert opened(path)["train"].fingerprint != first


def test_the_loaders_of_a_list(folder):
    path = write_csv(folder / "list.csv", "path,label", rows())
    overrides = ["data.img_size=8", "data.batch_size=9", "data.num_workers=0", "data.val_fraction=0.1"]
    data = DataModule(compose(["data=filelist", f"data.root={path}", *overrides]).data, seed=0)
    data.setup()
    assert [tuple(images.shape) for images, _ in data.train_dataloader()] == [(9, 3, 8, 8)] * 3
    assert data.class_names == ANIMALS


def test_a_list_is_utf_8_with_or_without_a_mark(folder):
    (folder / "list.csv").write_text(
        "\ufeffpath,label\n" + "".join(f'"{image}","größe, {label}"\n' for image, label in rows()), encoding="utf-8"
    )
    assert opened(folder / "list.csv")["val"].class_names == ["größe, ant", "größe, bee", "größe, cat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\nimages/00.png,ant\nimages/01.png\n", "list.csv, line 3: it has 1 fields, and the first line 2"),
        ("path,label\nimages/00.png,\n", "list.csv, line 2: its label is empty"),
        ("path,label\n,ant\n", "list.csv, line 2: its path is empty"),
        (
            "path,label,split\nimages/00.png,ant,trian\n",
            "list.csv, line 2: split 'trian': did you mean train? There are train, val, valid, validation, test",
        ),
        (
            "path,label\nimages/00.png,ant\n\nimages/../images/00.png,bee\n",
            "list.csv, line 4: images/../images/00.png is listed in line 2 already",
        ),
        (
            "path,label,split\nimages/00.png,ant,train\nimages/01.png,bee,val\n",
            "list.csv, line 3: no training image has the label 'bee'",
        ),
        ("path,label\nimages/99.png,ant\n", "99.png; paths start from the list's folder"),
        ('path,label\nimages/00.png,"ant\n', "list.csv, line 2: unexpected end of data"),
        (
            "file,label\nimages/00.png,ant\n",
            "list.csv has no column 'path'; it has file, label\nset data.path_column=NAME to one that it has",
        ),
        (
            "path,class\nimages/00.png,ant\n",
            "list.csv has no column 'label'; it has path, class\nset data.label_column=",
        ),
        ("", "list.csv has no column 'path'; it is empty"),
        ("path,label\n", "list.csv lists no image to train on"),
        ("path,label,split\nimages/00.png,ant,val\n", "list.csv lists no image to train on"),
        (
            "path,label\nimages/00.png,ant\nimages/01.png,bee\n",
            "has no val images, and data.val_fraction=0.1 holds out none of its 2 others",
        ),
    ],
)
def test_errors_name_the_file_and_the_line(folder, content, message):
    (folder / "list.csv").write_text(content)
    with pytest.raises(RequestError) as error:
        opened(folder / "list.csv")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_column_that_is_asked_for_must_exist(folder):
    path = write_csv(folder / "list.csv", "path,label,part", rows("ttt"))
    with pytest.raises(RequestError, match=r"no column 'partt'; it has path, label, part\nset data.split_column="):
        opened(path, "data.split_column=partt")


def test_files_that_are_no_lists(folder):
    (folder / "list.txt").write_text("path,label\n")
    (folder / "list.parquet").write_text("no Parquet file")
    os.mkfifo(folder / "fifo.csv")
    for name, message in (
        ("list.txt", "list.txt ends neither with .csv nor with .parquet"),
        ("list.parquet", "list.parquet is damaged or no Parquet file"),
        ("missing.csv", r"missing.csv \(No such file or directory\)\ndata.root=... must name a CSV or Parquet file"),
        ("images", "a folder, no regular file"),
        ("fifo.csv", "a device, FIFO or socket, no regular file"),
    ):
        with pytest.raises(RequestError, match=message):
            opened(folder / name)
    pyarrow.parquet.write_table(pyarrow.table({"path": [{"bytes": b""}], "label": [1]}), folder / "list.parquet")
    with pytest.raises(RequestError, match=r"list.parquet, row 1: path holds dict, no text or integer"):
        opened(folder / "list.parquet")
