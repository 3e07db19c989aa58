"""Shared code of the scripts that evaluate models on labelled images: their options, and the images in batches."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from _cli import integer

from sequencer.config.composition import compose, to_config
from sequencer.config.errors import RequestError
from sequencer.config.layouts import check_data, split_folder
from sequencer.config.request import load_run
from sequencer.config.schema import MOST_WORKERS, DataConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sequencer.models import LoadedModel

ROOT = "--data-root DIR"


def add_data_options(parser: ArgumentParser) -> None:
    """Adds the options that name the data set and the split, and say how its images are loaded."""
    data_sets = next(field.metadata["choices"] for field in fields(DataConfig) if field.name == "name")
    add = parser.add_argument
    add("--data", metavar="NAME", choices=data_sets, help=f"data set: {', '.join(data_sets)}; default: the run's")
    add("--data-root", metavar="DIR", help="folder that holds the data set")
    add("--split", choices=("val", "test"), help="default: test if the data set has one, otherwise val")
    add(
        "--num-workers",
        metavar="N",
        type=integer(0, MOST_WORKERS),
        help="loader processes; 0 loads in the main process",
    )


def need_data(model: str, args: Namespace) -> None:
    """Checks that a data set is named for a model that is no file or folder.

    Raises:
        RequestError: It is not.
    """
    if args.data is None and not os.path.exists(model):  # False for a name that is too long
        raise RequestError(f"{model} is no file or folder; a timm model needs a data set, with --data NAME")


def check_named_data(model: str, args: Namespace) -> None:
    """Checks the place of the data that the request or the run folder names, before torch is imported.

    Raises:
        RequestError: There is nothing.
    """
    try:
        data = compose([f"data={args.data}"]).data if args.data else to_config(load_run(Path(model))).data
    except RequestError:  # no run folder, or one of another version
        return
    data.root = args.data_root or data.root
    has_test = split_folder(data.root, "test").is_dir() or Path(data.root, "test.json").exists()
    check_data(data, [args.split or ("test" if has_test else "val")], root=ROOT)


class LabelledImages:
    """The first images of a split, preprocessed for a model; each iteration reads them again, in the same order.

    Attributes:
        data: The data set with the preprocessing of the model.
        split_name: `val` or `test`.
        fingerprint: Identifies the split, as `sequencer.data.Split.fingerprint` does.
        unreadable: Number of images that could not be read in the last iteration.
    """

    def __init__(self, loaded: "LoadedModel", args: Namespace, device: "torch.device", **changes: Any) -> None:
        """Opens the split that the options name.

        Args:
            loaded: The model.
            args: The options.
            device: Where the batches are moved.
            changes: As of `sequencer.evaluation.evaluation_data`, such as `img_size`.

        Raises:
            RequestError: The split is missing, or its number of classes is not the model's.
        """
        from sequencer.data import eval_transform, has_test_split, open_split
        from sequencer.evaluation import check_classes, evaluation_data

        changes |= {"root": args.data_root, "eval_batch_size": args.batch_size, "num_workers": args.num_workers}
        self.data = evaluation_data(loaded, args.data, **changes)
        self.split_name: Literal["val", "test"] = args.split or ("test" if has_test_split(self.data) else "val")
        check_data(self.data, [self.split_name], root=ROOT)
        self.split = open_split(self.data, self.split_name, eval_transform(self.data))
        check_classes(loaded, self.split.class_names)
        self.fingerprint = self.split.fingerprint
        self.limit, self.device, self.unreadable = args.limit or len(self.split), device, 0

    def __iter__(self) -> "Iterator[tuple[Tensor, Tensor, Tensor]]":
        """Yields images `B C H W` and labels `B` on the device, and the indices `B` of the images in the split.

        Raises:
            RequestError: No image can be read.
        """
        from sequencer.evaluation import tracked

        loader, seen, end = self.split.evaluation_loader(self.data), 0, len(self.split)
        steps = -(-min(self.limit, end) // self.data.eval_batch_size)
        for images, labels, indices in tracked(loader, f"evaluating at {self.data.img_size} px", steps):
            kept = self.limit - seen
            images, labels, indices = images[:kept], labels[:kept], indices[:kept]
            if len(labels):
                yield images.to(self.device), labels.to(self.device), indices
            seen += len(labels)
            if seen == self.limit:
                end = int(indices[-1]) + 1
                break
        self.unreadable = end - seen
        if not seen:
            raise RequestError("no image can be read")

    def describe(self, number: int) -> str:
        """Names the split, the data set, and a number of images."""
        return f"{number:,} images of {self.data.name}, {self.split_name} split"
