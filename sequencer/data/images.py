"""Image files decoded as RGB images, with one error for everything that can be wrong with them."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from sequencer.config.errors import first_line


class UnreadableImage(Exception):
    """An image that cannot be read, with its path and the reason in one line."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(self.path, reason)


def read_image(path: str | Path, file: BytesIO | None = None) -> Image.Image:
    """Decodes a whole image as RGB with eight bits per channel.

    The first frame of an animated image is taken and transparency is dropped. Grey images of 16 bits are scaled to
    eight, where Pillow would clip them at 255.

    Args:
        path: image file.
        file: open file to read in place of `path`, which then only names it in errors.

    Raises:
        UnreadableImage: the file is missing, damaged or no image, or has more pixels than Pillow considers safe.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd files that it reads correctly
        try:
            with Image.open(file or path) as image:
                image.load()
                return _to_rgb(image)
        except Exception as error:  # Pillow's decoders raise a dozen types
            raise UnreadableImage(path, reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Returns what an error says, in one line."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
