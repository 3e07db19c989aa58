"""Changes of the accuracy of a classifier under several conditions, on the same images."""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from sequencer.analysis.statistics import Interval, PairedComparison, compare_counts, holm, wilson

SIGNIFICANT = 0.05  # of a p-value adjusted by Holm's method


class Change(NamedTuple):
    """The accuracy under a condition beside that of the unchanged model on the unchanged images."""

    top1: Interval  # Wilson's score
    comparison: PairedComparison  # the condition first, without a change second
    p_holm: float  # adjusted for the number of conditions

    @property
    def is_significant(self) -> bool:
        """Whether the adjusted p-value is below 0.05."""
        return self.p_holm < SIGNIFICANT


class ChangeCounts:
    """Counts of images that are classified correctly under several conditions and without a change.

    It holds four counts for each condition, whatever the number of images.
    """

    def __init__(self, conditions: int) -> None:
        """Starts with no images, for a number of conditions."""
        self.counts = torch.zeros(conditions, 4, dtype=torch.int64)
        self.right = self.images = 0

    def add(self, clean: Bool[Tensor, " B"], changed: Bool[Tensor, "conditions B"]) -> None:
        """Adds a batch: whether each image is classified correctly without a change, and under each condition."""
        cells = (changed & clean, changed & ~clean, ~changed & clean, ~changed & ~clean)
        self.counts += torch.stack([cell.sum(dim=1) for cell in cells], dim=1).cpu()
        self.right += int(clean.sum())
        self.images += len(clean)

    def clean(self) -> Interval:
        """Returns the accuracy without a change."""
        return wilson(self.right, self.images)

    def changes(self) -> list[Change]:
        """Returns the change under each condition: McNemar's exact test, adjusted by Holm's method."""
        found = [compare_counts(*map(int, row)) for row in self.counts.tolist()]
        adjusted = holm([result.p_value for result in found])
        return [
            Change(wilson(result.both_right + result.only_first, self.images), result, p_value)
            for result, p_value in zip(found, adjusted, strict=True)
        ]
