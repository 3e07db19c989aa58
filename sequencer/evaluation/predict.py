"""Classes of image files, one after another, however many there are."""

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


@dataclass(frozen=True)
class Prediction:
    """What the model says of an image, or why it says nothing."""

    path: str
    classes: list[tuple[str, float]]  # name and probability, the most probable first
    error: str | None = None


def find_images(sources: Iterable[str]) -> Iterator[str | UnreadableImage]:
    """Files, the images in folders and below them, and what matches glob patterns, in the order of `sources`, each
    found when it is asked for; what is none of these, or holds none, as it stands."""
    for source in sources:
        if os.path.isdir(source):
            images = _walk(source)
            yield next(images, UnreadableImage(source, "a folder without images"))
            yield from images
        elif not os.path.exists(source) and glob.has_magic(source):
            matches: list[Any] = sorted(glob.iglob(source, recursive=True))
            yield from matches or [UnreadableImage(source, "matches no file")]
        else:
            yield source


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
) -> Iterator[Prediction]:
    """One prediction an image, in order; no more than three batches of images are held at a time.

    Args:
        model: gives logits `B K`; in eval mode, on `device`.
        transform: from an image to what the model takes, `C H W`.
        images: of `find_images`.
        class_names: of the K classes.
        top: how many classes a prediction names.
        num_workers: threads that read images.
    """
    loaded = _load(images, transform, num_workers, 2 * batch_size)
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
    images: Iterable[str | UnreadableImage], transform: Callable[[Image.Image], Tensor], num_workers: int, ahead: int
) -> Iterator[tuple[str, Tensor | UnreadableImage]]:
    """Reads up to `ahead` images before they are asked for."""

    def read(image: str | UnreadableImage) -> tuple[str, Tensor | UnreadableImage]:
        try:
            return (image.path, image) if isinstance(image, UnreadableImage) else (image, transform(read_image(image)))
        except UnreadableImage as error:
            return error.path, error

    pool = ThreadPoolExecutor(num_workers)
    try:
        pending: deque[Any] = deque()
        for image in images:
            pending.append(pool.submit(read, image))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _classify(
    model: nn.Module, x: Float[Tensor, "B C H W"], class_names: Sequence[str], top: int
) -> list[list[tuple[str, float]]]:
    """An image's best classes; none where its logits are not finite."""
    probabilities = model(x).double().softmax(dim=1).cpu()
    values, classes = (part[:, :top].tolist() for part in probabilities.sort(dim=1, descending=True, stable=True))
    return [
        [(class_names[k], p) for k, p in zip(*pair, strict=True)] if isfinite else []
        for *pair, isfinite in zip(classes, values, probabilities.isfinite().all(dim=1).tolist(), strict=True)
    ]


def readable_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Names of classes for people: ImageNet's in words; without any, timm's guess from their number, or numbers."""
    if class_names is not None:
        words = ImageNetInfo()
        known = set(words.label_names())
        return [words.label_name_to_description(name) if name in known else name for name in class_names]
    if (subset := infer_imagenet_subset({"num_classes": num_classes})) is None:
        return [str(index) for index in range(num_classes)]
    words = ImageNetInfo(subset)
    return [words.index_to_description(index) for index in range(num_classes)]
