"""Accuracy of any classifier on images that are turned, shifted, partly covered or shuffled.

Patches are covered with the mean colour, which is zero after normalisation, on a grid of 14 x 14 patches as in Naseer
et al. 2021 (arXiv 2105.10497). All patterns cover the same number of patches: `random` in a random order; `rows` and
`columns` line by line in a random order of the lines, the last one in part; `salient` and `least salient` in the order
of gradient times input (Shrikumar et al. 2016, arXiv 1605.01713), summed over a patch, which estimates to first order
how much the logit of the predicted class falls when the patch is covered. Random orders depend on the index of an image
alone, and a larger share covers what a smaller one does and more.

Shape letters: `B` batch, `C` channels, `H W` pixel rows and columns, `G` patches along a side, `K` classes.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from sequencer.analysis.changes import Change, ChangeCounts
from sequencer.analysis.gradients import image_gradients
from sequencer.analysis.statistics import Interval
from sequencer.evaluation import is_right

GRID = 14  # patches along each side of an image; 16 px at 224 px
SHARES = (0.1, 0.2, 0.3, 0.5)
SHIFTS = (16, 8, 4)  # the image is shifted by its side over these
SHUFFLES = (2, 4, 8)  # patches along each side
PATTERNS = ("random", "rows", "columns", "salient", "least salient")
SEED = 0

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]
Turn = Callable[[Tensor], Tensor]

TURNS: dict[str, Turn] = {
    "horizontal flip": lambda x: x.flip(-1),
    "vertical flip": lambda x: x.flip(-2),
    "transposition": lambda x: x.transpose(-2, -1),
    "turn by 90°": lambda x: x.rot90(1, (-2, -1)),
    "turn by 180°": lambda x: x.rot90(2, (-2, -1)),
    "turn by 270°": lambda x: x.rot90(3, (-2, -1)),
}


class Condition(NamedTuple):
    """A change of the images."""

    group: str  # `turn`, `shift along rows`, `shift along columns`, `shuffle`, or `cover ` with a pattern
    level: str | float  # a key of `TURNS`; the share of the side or of the patches; or patches along a side


class Symmetry(NamedTuple):
    """The accuracy of a model, and its change under each condition."""

    clean: Interval
    images: int
    changes: dict[Condition, Change]


CONDITIONS = (
    *(Condition("turn", name) for name in TURNS),
    *(Condition(f"shift along {axis}", 1 / part) for axis in ("rows", "columns") for part in SHIFTS),
    *(Condition(f"cover {pattern}", share) for pattern in PATTERNS for share in SHARES),
    *(Condition("shuffle", number) for number in SHUFFLES),
)


def symmetry(model: nn.Module, batches: Batches) -> Symmetry:
    """Measures the accuracy of a classifier under each of `CONDITIONS`.

    Memory does not grow with the number of images, and the result does not depend on the size of the batches.

    Args:
        model: A classifier in eval mode; any module that returns logits `B K`.
        batches: Normalised images `B C H W` and labels `B`, on the device of the model, and indices `B` of the images.
    """
    counts = ChangeCounts(len(CONDITIONS))
    for images, labels, indices in batches:
        with torch.inference_mode():
            clean = is_right(model(images), labels)
        orders = cover_orders(model, images, indices)
        changed = []
        for condition in CONDITIONS:
            with torch.inference_mode():
                changed.append(is_right(model(change(images, indices, condition, orders)), labels))
        counts.add(clean, torch.stack(changed))
    return Symmetry(counts.clean(), counts.images, dict(zip(CONDITIONS, counts.changes(), strict=True)))


def change(
    images: Float[Tensor, "B C H W"], indices: Int[Tensor, " B"], condition: Condition, orders: dict[str, Tensor]
) -> Float[Tensor, "B C H2 W2"]:
    """Applies a condition to images.

    Args:
        images: Normalised images.
        indices: Of the images in the split.
        condition: One of `CONDITIONS`.
        orders: What `cover_orders` returns.
    """
    group, level = condition
    if group == "turn":
        return TURNS[str(level)](images).contiguous()
    if group == "shuffle":
        return shuffle(images, indices, int(level))
    if group.startswith("shift"):
        axis = -1 if group == "shift along rows" else -2
        return images.roll(shifted_pixels(images.shape[axis], float(level)), axis)
    return cover(images, orders[group.removeprefix("cover ")], float(level))


def shifted_pixels(side: int, share: float) -> int:
    """Returns a share of a side in whole pixels, at least one."""
    return max(1, round(side * share))


def grid_of(height: int, width: int) -> tuple[int, int]:
    """Returns the numbers of rows and columns of patches: `GRID`, or the pixels of a smaller image."""
    return min(GRID, height), min(GRID, width)


def cover_orders(
    model: nn.Module, images: Float[Tensor, "B C H W"], indices: Int[Tensor, " B"]
) -> dict[str, Int[Tensor, "B G G2"]]:
    """Computes at which place of the order of each of `PATTERNS` every patch is covered, from 0.

    Args:
        model: As in `symmetry`; used for the salient patterns alone.
        images: Normalised images.
        indices: Of the images in the split.
    """
    rows, columns = grid_of(*images.shape[-2:])
    found = {}
    for number, pattern in enumerate(PATTERNS[:3]):
        draws = [_draw(pattern, np.random.default_rng((SEED, number, int(i))), rows, columns) for i in indices]
        found[pattern] = torch.from_numpy(np.stack(draws)).to(images.device)
    values = salience(model, images).flatten(1)
    for pattern, descending in zip(PATTERNS[3:], (True, False), strict=True):
        order = values.argsort(dim=1, descending=descending, stable=True)
        found[pattern] = order.argsort(dim=1).reshape(-1, rows, columns)
    return found


def _draw(pattern: str, generator: np.random.Generator, rows: int, columns: int) -> NDArray[Any]:
    """Draws the places of the patches in a random order of patches, rows or columns."""
    if pattern == "rows":
        return generator.permutation(rows)[:, None] * columns + np.arange(columns)
    if pattern == "columns":
        return generator.permutation(columns) * rows + np.arange(rows)[:, None]
    return generator.permutation(rows * columns).reshape(rows, columns)


def salience(model: nn.Module, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B G G2"]:
    """Computes gradient times input of the logit of the predicted class, summed over the pixels of each patch."""
    (gradient,) = image_gradients(model, images, lambda leaf: [model(leaf).amax(dim=1).sum()])
    product = (gradient * images).sum(dim=1)
    height, width = product.shape[-2:]
    grid = grid_of(height, width)
    sums = product.new_zeros(len(images), grid[0], width).index_add_(1, _patch_of(height, grid[0], product), product)
    patches = sums.new_zeros(len(images), *grid)
    return patches.index_add_(2, _patch_of(width, grid[1], product), sums)


def cover(images: Float[Tensor, "B C H W"], order: Int[Tensor, "B G G2"], share: float) -> Float[Tensor, "B C H W"]:
    """Sets the first patches of an order to zero: a share of all patches, rounded to whole ones."""
    covered = order < round(share * order[0].numel())
    rows, columns = (_patch_of(side, n, images) for side, n in zip(images.shape[-2:], order.shape[1:], strict=True))
    return images.masked_fill(covered[:, rows][:, :, columns][:, None], 0)


def _patch_of(side: int, number: int, like: Tensor) -> Tensor:
    """Returns the patch of each pixel along a side, where `number` patches are as equal as whole pixels allow."""
    return torch.arange(side, device=like.device) * number // side


def shuffle(images: Float[Tensor, "B C H W"], indices: Int[Tensor, " B"], number: int) -> Float[Tensor, "B C H W"]:
    """Permutes `number` x `number` patches of equal size; pixels left over at the bottom and right stay in place."""
    height, width = (side // number for side in images.shape[-2:])
    area = images[..., : height * number, : width * number]
    patches = (
        area.unflatten(-1, (number, width)).unflatten(-3, (number, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    )
    draws = [np.random.default_rng((SEED, len(PATTERNS) + number, int(i))).permutation(number**2) for i in indices]
    order = torch.from_numpy(np.stack(draws)).to(images.device)
    patches = patches[torch.arange(len(images), device=images.device)[:, None], order]
    shuffled = images.clone()
    shuffled[..., : height * number, : width * number] = (
        patches.unflatten(1, (number, number)).permute(0, 3, 1, 4, 2, 5).reshape(area.shape)
    )
    return shuffled
