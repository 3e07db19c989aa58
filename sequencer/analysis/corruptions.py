"""Corruptions of images in the manner of CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), "C-like".

The constants are those of `ImageNet-C/create_c/make_cifar_c.py` of github.com/hendrycks/robustness (Apache-2.0), which
made CIFAR-10-C. They are weaker than those of ImageNet-C. Images of CIFAR-10-C are not reproduced bit for bit: the
random numbers, the interpolation of warped images and the motion blur of ImageMagick, whose formula is used here, round
differently. Frost is missing, because it is an overlay of photographs. Lengths that the published code derives from the
side of an image, 32 there, are derived from the side here too; all others stay, so that larger images are blurred less.

Shape letters: `H W` rows and columns, `C` channels (1 or 3).
"""

import io
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import correlate, gaussian_filter, map_coordinates
from scipy.ndimage import zoom as resample

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
LUMA = np.array([0.299, 0.587, 0.114])  # of ITU-R 601
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image: Pixels, name: str, severity: int, seed: int, index: int) -> Pixels:
    """Corrupts an image; the result is a function of the arguments alone.

    Args:
        image: Square image, `H W C`.
        name: A key of `CORRUPTIONS`.
        severity: From 1 to 5.
        seed: Seed of all images.
        index: Index of the image, which has random numbers of its own for each corruption and severity.

    Returns:
        The corrupted image, `H W C`.
    """
    apply, constants = CORRUPTIONS[name]
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), severity, index])
    corrupted = apply(image, constants[severity - 1], generator)
    return np.clip(corrupted, 0, 255).astype(np.uint8)  # rounds down, as the published code does


def _gaussian_noise(image: Pixels, scale: float, generator: np.random.Generator) -> Floats:
    return image + 255 * generator.normal(scale=scale, size=image.shape)


def _shot_noise(image: Pixels, photons: float, generator: np.random.Generator) -> Floats:
    return generator.poisson(image / 255 * photons) / photons * 255


def _impulse_noise(image: Pixels, amount: float, generator: np.random.Generator) -> Floats:
    hit = generator.random(image.shape) <= amount
    salt = generator.random(image.shape) <= 0.5
    return np.where(hit, np.where(salt, 255.0, 0.0), image)


def _defocus_blur(image: Pixels, constants: tuple[float, float], generator: np.random.Generator) -> Floats:
    radius, alias_blur = constants
    side = np.arange(-8, 9)
    disk = (side[:, None] ** 2 + side**2 <= radius**2).astype(float)
    taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias_blur**2))
    taps /= taps.sum()
    kernel = correlate(disk / disk.sum(), np.outer(taps, taps), mode="mirror")
    return correlate(image.astype(float), kernel[..., None], mode="mirror")


def _glass_blur(image: Pixels, constants: tuple[float, int, int], generator: np.random.Generator) -> Floats:
    sigma, distance, iterations = constants
    smooth = (_smooth(image / 255, sigma) * 255).astype(np.uint8)
    height, width = smooth.shape[:2]
    rows, columns = np.arange(height - distance, distance, -1), np.arange(width - distance, distance, -1)
    offsets = generator.integers(-distance, distance, size=(iterations, len(rows), len(columns), 2))
    order = list(range(height * width))
    to = (rows[:, None] * width + columns).ravel().tolist()
    for columns_by, rows_by in offsets.transpose(0, 3, 1, 2):
        start = ((rows[:, None] + rows_by) * width + columns + columns_by).ravel().tolist()
        for target, source in zip(to, start, strict=True):
            order[target] = order[source]  # the published code means to swap two pixels and copies one
    shuffled = smooth.reshape(height * width, -1)[order].reshape(smooth.shape)
    return _smooth(shuffled / 255, sigma) * 255


def _motion_blur(image: Pixels, constants: tuple[int, float], generator: np.random.Generator) -> Floats:
    return _blur_along(image, *constants, generator.uniform(-45, 45))


def _zoom_blur(image: Pixels, factors: Floats, generator: np.random.Generator) -> Floats:
    x = image.astype(np.float32)
    return (x + sum(_zoom(x, float(factor)) for factor in factors)) / (len(factors) + 1)


def _snow(image: Pixels, constants: tuple[float, ...], generator: np.random.Generator) -> Floats:
    mean, deviation, zoom, threshold, radius, sigma, opacity = constants
    layer = _zoom(generator.normal(mean, deviation, image.shape[:2])[..., None], zoom)
    layer[layer < threshold] = 0
    sharp = (np.clip(layer, 0, 1) * 255).astype(np.uint8)
    flakes = _blur_along(sharp, int(radius), sigma, generator.uniform(-135, -45))
    x = image.astype(float)
    whitened = np.maximum(x, _luma(x) * 1.5 + 127.5)
    return opacity * x + (1 - opacity) * whitened + flakes + np.rot90(flakes, k=2)


def _fog(image: Pixels, constants: tuple[float, float], generator: np.random.Generator) -> Floats:
    amount, decay = constants
    height, width = image.shape[:2]
    x = image / 255
    brightest = x.max()
    x = x + amount * _plasma(1 << (max(height, width, 2) - 1).bit_length(), decay, generator)[:height, :width, None]
    return x * brightest / (brightest + amount) * 255


def _brightness(image: Pixels, amount: float, generator: np.random.Generator) -> Floats:
    """Adds to the value of HSV; with hue and saturation held, the channels are proportional to the value."""
    x = image / 255
    value = x.max(axis=-1, keepdims=True)
    brighter = np.clip(value + amount, 0, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter) * 255


def _contrast(image: Pixels, factor: float, generator: np.random.Generator) -> Floats:
    means = image.mean(axis=(0, 1), keepdims=True)
    return (image - means) * factor + means


def _elastic_transform(image: Pixels, constants: tuple[float, float, float], generator: np.random.Generator) -> Floats:
    side = image.shape[0]
    amount, sigma, shift = (side * constant for constant in constants)
    centre, third = np.array(image.shape[:2]) // 2, side // 3
    corners = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + generator.uniform(-shift, shift, size=corners.shape)
    to_source = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # x and y of the moved triangle
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    x, y = to_source[:2].T @ np.stack([columns.ravel(), rows.ravel()]) + to_source[2][:, None]
    warped = _sample(image, y.reshape(rows.shape), x.reshape(rows.shape), "mirror")
    dx, dy = (
        gaussian_filter(generator.uniform(-1, 1, rows.shape), sigma, mode="reflect", truncate=3) * amount
        for _ in range(2)
    )
    return _sample(warped, rows + dy, columns + dx, "reflect")


def _pixelate(image: Pixels, factor: float, generator: np.random.Generator) -> Pixels:
    height, width = image.shape[:2]
    small = to_pil(image).resize((max(1, int(width * factor)), max(1, int(height * factor))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)).reshape(image.shape)


def _jpeg_compression(image: Pixels, quality: int, generator: np.random.Generator) -> Pixels:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as stored:
        return np.asarray(stored).reshape(image.shape)


CORRUPTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (_glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, tuple(np.arange(1, end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26))),
    "snow": (
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (  # multiples of the side
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
}


def _smooth(x: Floats, sigma: float) -> Floats:
    return gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _luma(x: Floats) -> Floats:
    return (x @ LUMA)[..., None] if x.shape[-1] == 3 else x


def to_pil(image: Pixels) -> Image.Image:
    """Converts an array `H W C`, of one channel or three."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _zoom(x: Floats, factor: float) -> Floats:
    """Enlarges the centre of a square array `H H C` to its size."""
    side = x.shape[0]
    part = math.ceil(side / factor)
    top = (side - part) // 2
    large = resample(x[top : top + part, top : top + part], (factor, factor, 1), order=1)
    trim = (large.shape[0] - side) // 2
    return large[trim : trim + side, trim : trim + side]


def _sample(x: NDArray[Any], rows: Floats, columns: Floats, mode: str) -> Floats:
    """Samples each channel of `H W C` linearly at `rows` and `columns`, `H W` each."""
    channels = [
        map_coordinates(x[..., k].astype(float), [rows, columns], order=1, mode=mode) for k in range(x.shape[2])
    ]
    return np.stack(channels, axis=-1)


def _blur_along(image: Pixels, radius: int, sigma: float, angle: float) -> Floats:
    """Blurs to one side along a direction, as ImageMagick's `MotionBlurImage` does; borders are repeated.

    Args:
        image: `H W C`.
        radius: The kernel has `2 radius + 1` weights.
        sigma: Standard deviation of the half Gaussian of the weights, pixels.
        angle: Direction, degrees.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    down, right = (np.ceil(steps * f(math.radians(angle)) - 0.5).astype(int) for f in (math.sin, math.cos))
    rows, columns = (np.arange(length) for length in image.shape[:2])
    total = np.zeros(image.shape)
    for weight, dy, dx in zip(weights, down, right, strict=True):
        y, x = np.clip(rows + dy, 0, rows[-1]), np.clip(columns + dx, 0, columns[-1])
        total += weight * image[y[:, None], x]
    return np.rint(total)


def _plasma(side: int, decay: float, generator: np.random.Generator) -> Floats:
    """Draws a plasma fractal by the diamond-square algorithm on a torus.

    Args:
        side: Number of rows and columns, a power of two.
        decay: The displacement is divided by it whenever the step is halved.
        generator: Source of the displacements.

    Returns:
        Heights in [0, 1], `side side`.
    """
    heights = np.zeros((side, side))
    step, displacement = side, 100.0
    while step >= 2:
        half = step // 2

        def displaced(total: Floats, amount: float = displacement) -> Floats:
            return total / 4 + amount * generator.uniform(-amount, amount, total.shape)

        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = displaced(pairs + np.roll(pairs, -1, axis=1))
        centres = heights[half::step, half::step]
        for axis, edges in ((0, heights[::step, half::step]), (1, heights[half::step, ::step])):
            across = centres + np.roll(centres, 1, axis=axis)
            edges[:] = displaced(across + corners + np.roll(corners, -1, axis=1 - axis))
        step, displacement = half, displacement / decay
    heights -= heights.min()
    return heights / heights.max()
