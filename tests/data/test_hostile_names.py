"""Links that form cycles, and names of files and classes that are not UTF-8 or would change a terminal."""

import csv
import os
import shutil
import time
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from sequencer.config.composition import compose
from sequencer.config.errors import RequestError
from sequencer.data import DataModule, Quarantine, UnreadableImage
from sequencer.data.files import scan_folder
from sequencer.files import walk_once
from sequencer.training import run

CLASSES = ("ants\x1b[31m\nx", os.fsdecode(b"b\xe9es"))
SHOWN = (r"ants\x1b[31m\nx", r"b\xe9es")
MODEL = "model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}"


@pytest.fixture
def root(folder_root, tmp_path) -> Path:
    """An image folder that may be changed: 12 images of ants and 12 of bees to train, 6 and 6 to validate."""
    return Path(shutil.copytree(folder_root, tmp_path / "set"))


def counts(folder: Path) -> list[int]:
    samples, classes = scan_folder(str(folder))
    return [sum(label == index for _, label in samples) for index in range(len(classes))]


def test_the_order_is_that_of_torchvision(root, tmp_path):
    (root / "train" / "ants" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "outside" / "more").mkdir(parents=True)
    (root / "train" / "bees" / "link").symlink_to(tmp_path / "outside")
    for place in ("ants/deep", "ants/deep/er", "ants", "bees/link/more", "bees/link"):
        for name in ("Z.PNG", "a.jpeg", "notes.txt", ".hidden.png"):
            (root / "train" / place / name).touch()
    (root / "train" / "ants" / "gone.png").symlink_to("nowhere")
    expected = ImageFolder(str(root / "train"))
    assert scan_folder(str(root / "train")) == (expected.samples, expected.classes)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/ants/loop", ".."),
        ("train/ants/loop", "."),
        ("train/ants/loop", "../.."),
        ("train/ants/loop", "../bees"),
        ("train/ants/loop", "/"),
        ("train/ants/loop", "loop"),
    ],
)
def test_a_cycle_of_links_adds_no_image(root, link, target):
    (root / link).symlink_to(target)
    (root / "train" / "bees" / "loop").symlink_to(root / "train" / "ants")
    assert counts(root / "train") == [12, 12]


def test_a_cycle_outside_is_walked_once(root, tmp_path):
    outside = Path(shutil.copytree(root / "val" / "ants", tmp_path / "outside" / "a"))
    (outside / "b").mkdir()
    shutil.copy(outside / "00.png", outside / "b")
    (outside / "b" / "up").symlink_to(tmp_path / "outside")
    (outside / "back").symlink_to(root)
    for name in ("one", "two"):
        (root / "train" / "ants" / name).symlink_to(tmp_path / "outside")
    (root / "train" / "ants" / "three").symlink_to(outside)
    assert counts(root / "train") == [12 + 7, 12]


def test_links_to_folders_outside_and_to_files_stay_allowed(root, tmp_path):
    shutil.move(root / "train" / "ants", tmp_path / "pool")
    (root / "train" / "ants").symlink_to(tmp_path / "pool")
    (root / "train" / "bees" / "again.png").symlink_to("01.png")  # to train on an image twice
    shutil.move(root / "val", tmp_path / "kept")
    (root / "val").symlink_to(tmp_path / "kept")
    assert counts(root / "train") == [12, 13]
    assert counts(root / "val") == [6, 6]


def test_a_class_that_leads_back_into_the_split_is_refused(root):
    (root / "train" / "loop").symlink_to(".")
    data = DataModule(compose(["data=imagefolder", f"data.root={root}"]).data, 0)
    with pytest.raises(RequestError, match="Found no valid file for the classes loop"):
        data.setup()


def test_a_folder_that_cannot_be_listed_is_left_out(root, monkeypatch):
    scandir = os.scandir

    def denying(path):
        if str(path).endswith("bees"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denying)
    folders = dict(walk_once(str(root / "train"), str(root / "train")))
    assert [len(folders[str(root / "train" / name)]) for name in ("ants", "bees")] == [12, 0]


def rename(root: Path) -> Path:
    """Gives the classes and half of the images names that a terminal must not receive."""
    for split in ("train", "val"):
        for old, new in zip(("ants", "bees"), CLASSES, strict=True):
            folder = (root / split / old).rename(root / split / new)
            for image in sorted(folder.iterdir())[::2]:
                image.rename(folder / (os.fsdecode(b"\xff\n\x9b31m") + image.name))
            (folder / os.fsdecode(b"bad\xff\x1b]0;\n.png")).write_text("no image")
    return root


def assert_plain(text: str) -> None:
    text.encode("utf-8")
    assert not {c for c in text if (ord(c) < 32 or 127 <= ord(c) < 160) and c not in "\n\r"}


def test_a_run_and_its_evaluation_show_names_escaped(root, tmp_path, load_script, capfd):
    rename(root)
    options = ["data=imagefolder", f"data.root={root}", "data.img_size=16", "model.name=sequencer2d_t_8", MODEL,
               "trainer.accelerator=cpu", "trainer.max_epochs=1", "data.batch_size=8", "data.num_workers=0",
               "data.max_bad_share=0.5", "data.check=true", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    run(compose(options))
    folder = tmp_path / "run"
    assert (folder / "confusion.png").stat().st_size > 1000
    assert load_script("evaluate").main([str(folder), "--device", "cpu"]) == 0
    printed = capfd.readouterr()
    for text in (*printed, (folder / "train.log").read_text()):
        assert_plain(text)
    assert f"{SHOWN[0]}/bad" in "".join(printed.out.replace("\n", "").split(" "))
    for name in ("predictions.csv", "per_class.csv", "bad_samples.csv"):
        assert_plain((folder / "evaluation" / "imagefolder-val-raw-16px-crop0.875" / name).read_text("utf-8"))
    lines = (
        (folder / "evaluation" / "imagefolder-val-raw-16px-crop0.875" / "predictions.csv")
        .read_text("utf-8")
        .splitlines()
    )
    assert len(lines) == 13
    rows = list(csv.DictReader(lines))
    assert {row["class"] for row in rows} == set(SHOWN)
    assert {row["id"] for row in rows} >= {rf"{SHOWN[1]}/\xff\n\x9b31m01.png", f"{SHOWN[1]}/03.png"}
    assert len((folder / "bad_samples.csv").read_text("utf-8").splitlines()) == 5


def test_messages_about_classes_show_them_escaped(root):
    (root / "val" / "bees").rename(root / "val" / CLASSES[0])
    with pytest.raises(RequestError) as error:
        DataModule(compose(["data=imagefolder", f"data.root={root}"]).data, 0).setup()
    assert f"it lacks bees and adds {SHOWN[0]}\n" in str(error.value)


def test_an_image_is_listed_once_however_it_is_named(tmp_path):
    path = os.fsdecode(b"a\xff\n\x1b.png")
    for _ in range(2):
        quarantine = Quarantine(tmp_path / "bad.csv", "train", 10, 1.0)
        for _ in range(2):
            quarantine.report(UnreadableImage(path, "first\nsecond"))
    assert (tmp_path / "bad.csv").read_bytes().splitlines()[1:] == [rb"train,a\xff\n\x1b.png,first\nsecond"]


def test_a_list_that_others_continue_or_replace(tmp_path):
    path = tmp_path / "bad.csv"
    one, two = (Quarantine(path, "train", 10, 1.0) for _ in range(2))
    one.report(UnreadableImage("a.png", "one"))
    content = path.read_bytes()
    two.report(UnreadableImage("b.png", "two"))
    one.report(UnreadableImage("b.png", "two"))
    assert path.read_text().splitlines() == ["split,path,reason", "train,a.png,one", "train,b.png,two"]
    path.write_bytes(content)
    two.report(UnreadableImage("b.png", "two"))
    one.report(UnreadableImage("b.png", "two"))
    assert path.read_text().splitlines() == ["split,path,reason", "train,a.png,one", "train,b.png,two"]


def test_a_long_list_is_read_once(tmp_path):
    """Reading it for each of 5,000 images would take half a minute."""
    quarantine = Quarantine(tmp_path / "bad.csv", "train", 10**6, 1.0)
    start = time.perf_counter()
    for number in range(5000):
        quarantine.report(UnreadableImage(f"{number}.png", "one"))
    assert time.perf_counter() - start < 10
