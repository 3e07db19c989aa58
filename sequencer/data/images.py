"""Image files as RGB images, or one error for whatever may be wrong with them."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


class UnreadableImage(Exception):
    """An image file that cannot be read, with the reason in a line."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(self.path, reason)


def read_image(path: str | Path, file: BytesIO | None = None) -> Image.Image:
    """The whole image of `path`, or of the open `file` that is called so, as RGB with eight bits a channel.

    Of an animated one, the first frame.
    Transparency is dropped. Grey images of 16 bits are scaled to eight, where Pillow would cut them off at 255.

    Raises:
        UnreadableImage: no image, a damaged one, one of more pixels than Pillow takes for harmless, or no file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's, about what it reads all the same
        try:
            with Image.open(file or path) as image:
                image.load()
                return _to_rgb(image)
        except Exception as error:  # Pillow's decoders raise a dozen kinds
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UnreadableImage(path, (reason or type(error).__name__).splitlines()[0]) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
