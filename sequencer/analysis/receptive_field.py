"""Effective receptive fields of tokens, by the gradient with respect to the image (Luo et al. 2016, arXiv 1701.04128).

The gradient of a token's summed channels says how much each pixel changes the token. Its positive part, summed over the
channels of the image and over images, is the contribution `A` of each pixel. The published procedures differ in the
token, in the treatment of its channels and in the scale; they are presets, since receptive fields that were computed
differently cannot be compared:

- `sequencer`, the procedure of the paper's code (`generate_erf.py` of okojoalg/sequencer): the token in row H // 2 - 1
  and column W // 2 - 1, which is half a token before the centre; the sum over images; log10(1 + A), scaled by the
  minimum and maximum over all maps of a picture.
- `replknet`, the procedure of Ding et al. 2022 (arXiv 2203.06717), which most later papers follow: the token in row
  H // 2 and column W // 2; the channels that are negative are left out (ReLU); the mean over images;
  log10(1 + A) / max, for each map by itself.

Shape letters: `B` batch, `C` channels, `H W` rows and columns of pixels or tokens, `R S` rows and columns of a grid.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from sequencer.analysis.gradients import image_gradients
from sequencer.analysis.spacing import evenly_spaced

CHUNK = 64  # tokens in a backward pass
SHARES = (0.2, 0.3, 0.5, 0.99)  # of the contribution, in extents and area ratios
MOST_STAGES = 5  # of a model; of one with more stages, such as a ViT, four at equal distances are taken
TOLERANCE = 1e-9  # of a share, for rounding in sums


class Preset(NamedTuple):
    """A published procedure."""

    before_centre: int  # rows and columns from the token to the one in row H // 2 and column W // 2
    positive_channels: bool  # whether negative channels of the token are left out
    mean: bool  # over images, in place of the sum


PRESETS = {"sequencer": Preset(1, False, False), "replknet": Preset(0, True, True)}


class StageField(NamedTuple):
    """The effective receptive field of one token at the end of a stage."""

    stage: str  # name of the module
    tokens: tuple[int, int]  # rows and columns of tokens
    token: tuple[int, int]  # row and column of the token, counted from 0
    contribution: NDArray[np.float64]  # `A`, of the size of the images, `H W`


class Measures(NamedTuple):
    """Where most of a receptive field lies and how large it is; one value for each of `SHARES`."""

    columns: list[range]  # of pixels, the extent along a row; empty where no pixel contributes
    rows: list[range]  # of pixels, the extent along a column; empty where no pixel contributes
    area: list[float]  # area of a square over that of the image; NaN where no pixel contributes


def check_stages(model: nn.Module) -> nn.Module:
    """Checks that a model gives the outputs of its stages by timm's interface `forward_intermediates`.

    Raises:
        ValueError: It does not, or is in training mode.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, which gives the outputs of stages")
    if model.training:
        raise ValueError("the model is in training mode; call eval() first")
    return model


def receptive_fields(model: nn.Module, batches: Iterable[Tensor], preset: str = "sequencer") -> list[StageField]:
    """Computes the effective receptive field of the central token of every stage.

    The stages are those of timm's `forward_intermediates`: any layout of tokens is a map there, and class tokens are
    left out. The final norm is not applied. Memory does not grow with the number of batches.

    Args:
        model: A model of this package or of timm, in eval mode.
        batches: Normalised images `B C H W`, all of one size, on the device of the model; at least one batch.
        preset: A key of `PRESETS`.

    Raises:
        ValueError: As `check_stages`, or a stage has no map of tokens.
    """
    check_stages(model)
    chosen = PRESETS[preset]
    total, count, stages = torch.zeros(0), 0, []
    for images in batches:
        if not count:
            stages = _stages(model, images[:1])
            total = torch.zeros(len(stages), *images.shape[-2:], dtype=torch.float64)
        places = [(_place(rows, chosen), _place(columns, chosen)) for _, _, (rows, columns) in stages]

        def channels(outputs: list[Tensor], places: Any = places) -> list[Tensor]:
            picked = [output[:, :, r, c] for output, (r, c) in zip(outputs, places, strict=True)]
            return [(values.relu() if chosen.positive_channels else values).sum() for values in picked]

        maps = _positive_gradients(model, images, [index for index, _, _ in stages], channels)
        total += torch.stack([contribution.sum(dim=0).double().cpu() for contribution in maps])
        count += len(images)
    arrays = (total / count if chosen.mean else total).numpy()
    return [
        StageField(name, tokens, place, values)
        for (_, name, tokens), place, values in zip(stages, places, arrays, strict=True)
    ]


def _place(tokens: int, preset: Preset) -> int:
    """Returns the index of the central one of a number of rows or columns of tokens."""
    return max(tokens // 2 - preset.before_centre, 0)


def token_fields(
    model: nn.Module, images: Float[Tensor, "B C H W"], stage: int, most: int = 8
) -> Float[np.ndarray, "R S H W"]:
    """Computes the effective receptive fields of the tokens of a stage, on a grid of at most `most` x `most` tokens.

    The procedure is that of the preset `sequencer`, for every token in place of the centre and averaged over images.
    One backward pass serves many tokens, each with a copy of the image.

    Args:
        model: In eval mode.
        images: Normalised images, on the device of the model.
        stage: Index of the stage.
        most: Rows and columns of the grid; tokens between its points are left out.

    Returns:
        For the token in row r and column s of the grid, a map of the size of the images.
    """
    with torch.no_grad():
        height, width = _outputs(model, images[:1], [stage])[0].shape[-2:]
    rows, columns = (evenly_spaced(n, most) for n in (height, width))
    places = [(r, c) for r in rows for c in columns]
    total = torch.zeros(len(places), *images.shape[-2:], dtype=torch.float64)
    for image in images:
        for start in range(0, len(places), CHUNK):
            chosen = places[start : start + CHUNK]

            def channels(outputs: list[Tensor], chosen: Any = chosen) -> list[Tensor]:
                return [torch.stack([outputs[0][number, :, r, c].sum() for number, (r, c) in enumerate(chosen)]).sum()]

            copies = image.expand(len(chosen), -1, -1, -1)
            total[start : start + CHUNK] += _positive_gradients(model, copies, [stage], channels)[0].double().cpu()
    return (total / len(images)).reshape(len(rows), len(columns), *images.shape[-2:]).numpy()


def _positive_gradients(
    model: nn.Module, images: Tensor, stages: list[int], values: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """Computes the positive part of gradients with respect to the images, summed over their channels.

    Args:
        model: In eval mode.
        images: `B C H W`.
        stages: Indices of stages.
        values: Computes scalars from the outputs of these stages.

    Returns:
        For each scalar, maps `B H W`.
    """
    gradients = image_gradients(model, images, lambda leaf: values(_outputs(model, leaf, stages)))
    return [gradient.relu().sum(dim=1) for gradient in gradients]


def _outputs(model: Any, images: Tensor, stages: list[int] | None = None) -> list[Tensor]:
    """Returns the outputs `B C H W` of stages, by default all of them."""
    return model.forward_intermediates(images, stages, stop_early=True, output_fmt="NCHW", intermediates_only=True)


def _stages(model: Any, image: Tensor) -> list[tuple[int, str, tuple[int, int]]]:
    """Lists the stages that are looked at: index, name, and rows and columns of tokens."""
    with torch.no_grad():
        outputs = _outputs(model, image)
    info = list(getattr(model, "feature_info", []))
    names = [str(entry["module"]) for entry in info] if len(info) == len(outputs) else []
    count = len(outputs)
    indices = range(count) if count <= MOST_STAGES else [count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    stages = []
    for index in indices:
        name, shape = names[index] if names else f"stage {index}", tuple(outputs[index].shape)
        if len(shape) != 4:
            raise ValueError(f"the output of {name} is no map of tokens: its shape is {shape}")
        stages.append((index, name, (shape[2], shape[3])))
    return stages


def scaled(fields: Sequence[StageField], preset: str) -> list[NDArray[np.float64]]:
    """Scales contributions to [0, 1] as the pictures of a preset show them.

    Args:
        fields: All fields of a picture: `sequencer` has one scale for all of them.
        preset: A key of `PRESETS`.
    """
    maps = [np.log10(1 + field.contribution) for field in fields]
    if preset == "replknet":
        return [values / (values.max() or 1) for values in maps]
    low, high = min(values.min() for values in maps), max(values.max() for values in maps)
    return [(values - low) / (high - low or 1) for values in maps]


def measure(field: StageField) -> Measures:
    """Measures a receptive field along rows and columns and as an area.

    An extent is the shortest interval of pixels that holds a share of the contribution `A`, summed over the other axis.
    The area is RepLKNet's: that of the smallest square, centred on the pixel in row H // 2 and column W // 2, that
    holds a share of log10(1 + A), over the area of the image.
    """
    extents = [[_shortest(field.contribution.sum(axis=axis), share) for share in SHARES] for axis in (0, 1)]
    return Measures(extents[0], extents[1], _areas(np.log10(1 + field.contribution)))


def _shortest(values: NDArray[np.float64], share: float) -> range:
    """Returns the shortest interval of indices that holds a share of the values, which are not negative."""
    sums = np.concatenate([[0.0], values.cumsum()])
    if not sums[-1] > 0:
        return range(0)
    starts = sums[sums <= (1 - share + TOLERANCE) * sums[-1]]  # further on, too little is left
    stops = np.searchsorted(sums, starts + (share - TOLERANCE) * sums[-1])
    start = int((stops - np.arange(len(starts))).argmin())
    return range(start, int(stops[start]))


def _areas(values: NDArray[np.float64]) -> list[float]:
    """Computes the areas of the smallest squares around the centre that hold each of `SHARES` of a map.

    A square ends at the borders of the image.
    """
    away = [np.abs(np.arange(size) - size // 2) for size in values.shape]
    ring = np.maximum.outer(*away).ravel()
    held, pixels = np.bincount(ring, values.ravel()).cumsum(), np.bincount(ring).cumsum()
    if not held[-1] > 0:
        return [math.nan] * len(SHARES)
    return [float(pixels[np.argmax(held >= (share - TOLERANCE) * held[-1])] / values.size) for share in SHARES]
