"""Where the files of each data set lie below `data.root`, checked before torch is imported."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from sequencer.config.errors import RequestError
from sequencer.config.file_lists import check_list
from sequencer.config.schema import DataConfig
from sequencer.printing import printable

ROOT, DOWNLOAD = "data.root=...", "data.download=true"  # how train.py is told
FOLDERS = {"val": ("val", "validation", "valid")}  # of a split in an image folder, by its name
IMAGE_FOLDER = "{root} must name a folder with train/ and val/ (test/ is optional), each with "


@dataclass(frozen=True)
class Layout:
    """Where the files of a data set lie.

    Args:
        path: what must be there below `data.root`; `{split}` stands for the name of the split.
        remedy: what to do where it is missing, in which `{root}` stands for the argument that names `data.root`; the
            default asks for the folder that holds `path`.
        downloads: whether `data.download` fetches it.
    """

    path: str = ""
    remedy: str = ""
    downloads: bool = False


LAYOUTS = {
    "mnist": Layout("MNIST/raw", downloads=True),
    "fashion_mnist": Layout("FashionMNIST/raw", downloads=True),
    "cifar10": Layout("cifar-10-batches-py", downloads=True),
    "cifar100": Layout("cifar-100-python", downloads=True),
    "flowers102": Layout("flowers-102/jpg", downloads=True),
    "stanford_cars": Layout(
        "stanford_cars/devkit",
        "its original address is gone: fetch it elsewhere, or name the folder that holds stanford_cars/ with {root}",
    ),
    "imagefolder": Layout("{split}", IMAGE_FOLDER + "a folder of images per class"),
    "imagenet": Layout("{split}", IMAGE_FOLDER + "a folder per synset (n01440764, ...)"),
    "filelist": Layout(remedy="{root} must name a CSV or Parquet file with a column of paths and a column of labels"),
    "webdataset": Layout(
        "{split}.json", "scripts/shards.py writes shards with their index, or an index for existing shards"
    ),
}


def split_folder(root: str | Path, split: str) -> Path:
    """Returns the folder of a split in an image folder: for `val`, `validation/` and `valid/` are accepted too."""
    names = FOLDERS.get(split, (split,))
    folder = Path(root).expanduser()
    return next((path for name in names if (path := folder / name).is_dir()), folder / split)


def check_data(config: DataConfig, splits: Iterable[str] = ("train", "val"), root: str = ROOT) -> None:
    """Checks that there is something where the files of a data set must lie, unless they are remote or downloaded.

    Of a list of files the header is checked too.

    Args:
        config: The data set; one that is not in `LAYOUTS` is not checked.
        splits: The splits that are needed.
        root: The argument that names `data.root`, for the message.

    Raises:
        RequestError: There is nothing, or a list of files lacks a column.
    """
    layout = LAYOUTS.get(config.name)
    if layout is None or urlparse(config.root).scheme or (config.download and layout.downloads):
        return
    for split in splits:
        place = Path(config.root).expanduser() / layout.path.format(split=split)
        if layout.path == "{split}":
            place = split_folder(config.root, split)
        if not os.path.exists(place):
            error = missing_data(config, layout, split, "there is no such file or folder", root)
            parent = Path(config.root).expanduser().parent
            if layout.path == "{split}" and all(split_folder(parent, name).is_dir() for name in ("train", "val")):
                named = root.replace("...", printable(parent)).replace("DIR", printable(parent))
                hint = f"its parent has train/ and val/: did you mean {named}?"
                raise RequestError(f"{str(error).splitlines()[0]}\n{hint}")
            raise error
    if config.name == "filelist":
        check_list(config, root)


def missing_data(config: DataConfig, layout: Layout, split: str, reason: str, root: str = ROOT) -> RequestError:
    """Returns the error of a data set that is missing or incomplete."""
    part = layout.path.format(split=split)
    place = str((Path(config.root).expanduser() / part).resolve())
    if urlparse(config.root).scheme:
        place = f"{config.root.rstrip('/')}/{part}"
    remedy = layout.remedy or f"name the folder that holds {part.partition('/')[0]}/ with {{root}}"
    if layout.downloads and root == ROOT:
        fetch = "check the connection" if config.download else f"fetch it with {DOWNLOAD}"
        remedy = f"{fetch}, or {remedy}"
    return RequestError(
        f"data={config.name}: no complete set in {printable(place)} ({printable(reason)})\n{remedy.format(root=root)}"
    )
