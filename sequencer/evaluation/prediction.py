"""Predictions for image files, as a stream: memory does not grow with the number of images."""

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from sequencer.data import UnreadableImage, read_image
from sequencer.files import walk_once


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, or the reason why there are none."""

    path: str
    classes: list[tuple[str, float]]  # name and probability, the most probable first; empty if there is an error
    error: str | None = None


def find_images(sources: Iterable[str]) -> Iterator[str | UnreadableImage]:
    """Yields the paths of images, in the order of `sources`, without listing them all first.

    Args:
        sources: Files, folders (searched recursively for the suffixes of image files) and glob patterns.

    Yields:
        A path; or an `UnreadableImage` for a folder without images and for a pattern that matches nothing. A source
        that does not exist is yielded as it is, and fails when it is read.
    """
    for source in sources:
        if os.path.isdir(source):
            images = _walk(source)
            yield next(images, UnreadableImage(source, "a folder without images"))
            yield from images
        elif not os.path.exists(source) and glob.has_magic(source):
            matches: list[Any] = sorted(set(_expand(source)))
            yield from matches or [UnreadableImage(source, "matches no file")]
        else:
            yield source


def _expand(pattern: str) -> Iterator[str]:
    """Yields what a glob pattern matches; `**` stands for any number of folders, each real folder once."""
    components = pattern.split(os.sep)
    if "**" not in components:
        yield from glob.iglob(pattern)
        return
    place = components.index("**")
    rest = components[place + 1 :] or ["*"]
    for start in glob.iglob(os.sep.join([*components[:place], ""])) if place else [""]:
        for folder, _ in walk_once(start or os.curdir, start or os.curdir):
            inside = os.path.relpath(folder, start or os.curdir)
            if inside == os.curdir:
                inside = ""
            if any(name.startswith(".") for name in inside.split(os.sep)):
                continue  # as in a shell, names with a leading dot are not matched
            yield from _expand(os.path.join(glob.escape(start), glob.escape(inside), *rest))


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield os.path.join(parent, name)


@torch.inference_mode()
def predict(
    model: nn.Module,
    transform: Callable[[Image.Image], Tensor],
    images: Iterable[str | UnreadableImage],
    class_names: Sequence[str],
    top: int,
    batch_size: int,
    num_workers: int,
    device: torch.device | str,
    shorter_side: int = 0,
) -> Iterator[Prediction]:
    """Yields one prediction for every image, in order; at most three batches of images are in memory at a time.

    Args:
        model: Returns logits `B K`; in eval mode, on `device`.
        transform: Turns an image into the model's input, `C H W`.
        images: As `find_images` yields them.
        class_names: Names of the K classes.
        top: Number of classes in a prediction.
        batch_size: Images per forward pass.
        num_workers: Threads that read images.
        device: Where the model is.
        shorter_side: Length in pixels that `transform` resizes an image's shorter side to, as `resized_side` returns
            it; an image that would take too much memory is refused before it is decoded.
    """

    def read(path: str) -> Tensor:
        return transform(read_image(path, shorter_side=shorter_side))

    loaded = _load(images, read, num_workers, 2 * batch_size)
    while batch := list(islice(loaded, batch_size)):
        readable = [image for _, image in batch if isinstance(image, Tensor)]
        answers = iter(_classify(model, torch.stack(readable).to(device), class_names, top) if readable else [])
        for path, image in batch:
            if isinstance(image, UnreadableImage):
                yield Prediction(path, [], image.reason)
            else:
                classes = next(answers)
                yield Prediction(path, classes, None if classes else "the model's output is not finite")


def _load(
    images: Iterable[str | UnreadableImage], read: Callable[[str], Tensor], num_workers: int, ahead: int
) -> Iterator[tuple[str, Tensor | UnreadableImage]]:
    """Yields path and image, or the error, in order; threads read up to `ahead` images in advance."""

    def attempt(image: str | UnreadableImage) -> tuple[str, Tensor | UnreadableImage]:
        try:
            return (image.path, image) if isinstance(image, UnreadableImage) else (image, read(image))
        except UnreadableImage as error:
            return error.path, error

    pool = ThreadPoolExecutor(num_workers)
    try:
        pending: deque[Any] = deque()
        for image in images:
            pending.append(pool.submit(attempt, image))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _classify(
    model: nn.Module, x: Float[Tensor, "B C H W"], class_names: Sequence[str], top: int
) -> list[list[tuple[str, float]]]:
    """Names and probabilities of the `top` classes of every image; empty if its probabilities are not finite."""
    probabilities = model(x).double().softmax(dim=1).cpu()
    values, classes = (tensor[:, :top].tolist() for tensor in probabilities.sort(dim=1, descending=True, stable=True))
    return [
        [(class_names[k], p) for k, p in zip(*pair, strict=True)] if isfinite else []
        for *pair, isfinite in zip(classes, values, probabilities.isfinite().all(dim=1).tolist(), strict=True)
    ]


def readable_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Class names that can be read: those of ImageNet's synsets in words, other names as they are.

    Args:
        class_names: If None, timm's guess from the number of classes is taken, otherwise the indices.
        num_classes: Number of classes.
    """
    if class_names is not None:
        words = ImageNetInfo()
        known = set(words.label_names())
        return [words.label_name_to_description(name) if name in known else name for name in class_names]
    if (subset := infer_imagenet_subset({"num_classes": num_classes})) is None:
        return [str(index) for index in range(num_classes)]
    words = ImageNetInfo(subset)
    return [words.index_to_description(index) for index in range(num_classes)]
