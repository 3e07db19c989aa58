"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) by timm, for batches of any size."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from sequencer.config.schema import AugmentConfig

MixFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_mixup(augment: AugmentConfig, num_classes: int) -> MixFunction | None:
    """A function (images, labels) -> (mixed images, soft targets with label smoothing); None where mixing is off.

    timm draws its parameters once per batch from NumPy's global random state, which must be saved and restored for a
    run to be repeated.
    """
    if augment.mixup == 0 and augment.cutmix == 0:
        return None
    mixup = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
    return partial(_mix, mixup)


def _mix(
    mixup: Mixup, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B classes"]]:
    """Mixes `images` in place; timm requires an even number, so the last image of an odd batch is not mixed."""
    even = len(images) - len(images) % 2
    _, mixed_targets = mixup(images[:even], labels[:even])
    last_target = mixup_target(labels[even:], mixup.num_classes, smoothing=mixup.label_smoothing)
    return images, torch.cat((mixed_targets, last_target))
