"""Small pictures inside the pages, as data URIs, and the images of a split that they show."""

import base64
import io
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sequencer.analysis.attribution_plots import signed_colours
from sequencer.analysis.plots import Array
from sequencer.config.schema import DataConfig
from sequencer.data import Split

THUMBNAIL = 96  # pixels of the longer side at most
LOSSLESS = 16  # pixels up to which compression would be seen


def read_again(
    split: Split, data: DataConfig, indices: Iterable[int]
) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Reads a split until the wanted images have been found.

    Args:
        split: The split.
        data: Its settings.
        indices: Of the wanted images.

    Yields:
        Batches `B C H W` that hold wanted images, with the row and the index of each of these.
    """
    missing = set(indices)
    for images, _, found in split.evaluation_loader(data):
        if wanted := [(row, index) for row, index in enumerate(found.tolist()) if index in missing]:
            missing -= {index for _, index in wanted}
            yield images, wanted
        if not missing:
            break


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """Encodes an image `H W 3`, made smaller where it is large."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, lossless=max(image.size) <= LOSSLESS)
    return _uri(buffer, "webp")


def signed_map(values: Array) -> str:
    """Encodes a map `H W`, a pixel for each value, by the colours of `sequencer.analysis.attribution_plots`."""
    scaled = values / (np.abs(values).max() or 1)
    return _png(Image.fromarray((255 * signed_colours(scaled)).round().astype(np.uint8)))


def field_sheet(fields: Array) -> str:
    """Encodes the maps `R S H W` of a grid of tokens as one grey picture, each scaled to its own maximum by a root."""
    rows, columns, height, width = fields.shape
    most = fields.max(axis=(2, 3), keepdims=True)
    grey = np.sqrt(fields / np.where(most > 0, most, 1))
    sheet = grey.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    return _png(Image.fromarray((255 * sheet).round().astype(np.uint8)))


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _uri(buffer, "png")


def _uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
