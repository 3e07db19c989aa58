"""Image files decoded as RGB images, with one error for everything that can be wrong with them."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sequencer.files import check_regular
from sequencer.printing import first_line

# of Pillow; any other decoder is code that an image would start, Ghostscript for example
FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF", "GIF")
MOST_MEMORY = 3 * 2**29  # bytes, for decoding an image and for resizing it
# bytes per pixel that decoding takes: Pillow's four in the file's mode and four as RGB; WebP's decoder has three copies
PIXEL, PIXEL_WEBP = 8, 16


class UnreadableImage(Exception):
    """An image that cannot be read, with its path and the reason in one line."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(self.path, reason)


def read_image(path: str | Path, file: BytesIO | None = None, shorter_side: int = 0) -> Image.Image:
    """Decodes a whole image as RGB with eight bits per channel.

    The first frame of an animated image is taken and transparency is dropped. Grey images of 16 bits are scaled to
    eight, where Pillow would clip them at 255.

    Args:
        path: image file in one of the `FORMATS`, whatever its suffix.
        file: open file to read in place of `path`, which then only names it in errors.
        shorter_side: length in pixels that the image's shorter side is resized to after decoding; 0 if it is not.

    Raises:
        UnreadableImage: the file is missing, damaged, no image or no regular file; it has more pixels than Pillow
            considers safe; or decoding or resizing it takes more than `MOST_MEMORY`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd files that it reads correctly
        try:
            if file is None:
                check_regular(path)
            with Image.open(file or path, formats=FORMATS) as image:
                check_memory(image.size, shorter_side, PIXEL_WEBP if image.format == "WEBP" else PIXEL)
                _check_tiles(image)
                image.load()
                return _to_rgb(image)
        except UnidentifiedImageError as error:
            raise UnreadableImage(path, f"no image in one of the formats {', '.join(FORMATS)}") from error
        except Exception as error:  # Pillow's decoders raise a dozen types
            raise UnreadableImage(path, reason_of(error)) from error


def check_memory(size: tuple[int, int], shorter_side: int = 0, pixel: int = PIXEL) -> None:
    """Checks, from its size alone, what decoding an image and resizing its shorter side takes.

    Args:
        size: width and height of the image, pixels.
        shorter_side: length in pixels that the shorter side is resized to; 0 if it is not.
        pixel: bytes per pixel that decoding takes.

    Raises:
        ValueError: it takes more than `MOST_MEMORY`, or the image has no pixels.
    """
    width, height = size
    short, long = sorted(size)
    if short < 1:
        raise ValueError("it has no pixels")
    # besides its pixels an image holds a pointer per row, in either mode; it is resized along one axis after the other
    decoded = pixel * width * height + 16 * height
    resized = 4 * (shorter_side * long + shorter_side * (shorter_side * long // short))
    if max(decoded, resized) > MOST_MEMORY:
        what = f"resizing it to {shorter_side} pixels" if resized > MOST_MEMORY else "decoding it"
        raise ValueError(f"it has {width} x {height} pixels: {what} takes more than {MOST_MEMORY >> 20} MiB")


def _check_tiles(image: Image.Image) -> None:
    """Checks the size of a TIFF file's tiles, which the decoder holds whole, however small the image is."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(322), tags.get(323)
    if isinstance(width, int) and isinstance(height, int):
        check_memory((width, height))


def reason_of(error: BaseException) -> str:
    """Returns what an error says, in one line."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image) >> 8
        image = Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
