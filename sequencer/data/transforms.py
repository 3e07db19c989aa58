"""Transforms from an image to the normalised tensor that a model takes, built of timm's and torchvision's steps.

An image is a PIL image of any mode and size, or a float tensor `1 H W` in [0, 1] (the digits). An image that already
has the right size is not resampled.
"""

import math
from functools import partial
from itertools import chain
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop, Resize
from torchvision.transforms.functional import to_pil_image

from sequencer.config.errors import RequestError, show
from sequencer.config.schema import DataConfig
from sequencer.data.seeding import own_random_states
from sequencer.printing import first_line

MOST_OPERATIONS = 100  # of an augmentation policy in a row


def eval_transform(config: DataConfig) -> Compose:
    """The transform of timm's evaluation: resize the shorter side to `img_size / crop_pct`, crop the centre, normalise.

    Returns:
        A transform whose results are float32 `C H W`.

    Raises:
        RequestError: `data.in_chans` is neither 1 nor 3, or `data.mean` or `data.std` has another number of values.
    """
    mean, std = channel_statistics(config)
    steps = create_transform(
        config.img_size, interpolation=_fixed_interpolation(config), mean=mean, std=std, crop_pct=config.crop_pct
    )
    return Compose([partial(to_channels, in_chans=config.in_chans), *steps.transforms])


def train_transform(config: DataConfig) -> Compose:
    """The transform of training: augment as `config.augment` says, then normalise.

    As in timm, `color_jitter` is ignored where `auto_augment` is given, unless its policy is 3a.

    Returns:
        A transform whose results are float32 `C H W`.

    Raises:
        RequestError: as in `eval_transform`, or a range or policy that timm does not understand or that fails on an
            image.
    """
    augment = config.augment
    geometry, colour, finish = _timm_train_stages(config)
    if augment.scale is None:  # timm has RandomResizedCrop here
        size = [config.img_size, config.img_size]
        geometry[0] = Resize(size, interpolation=str_to_interp_mode(_fixed_interpolation(config)))
    if augment.crop_padding > 0:
        geometry.append(RandomCrop(config.img_size, padding=augment.crop_padding))
    if augment.auto_augment:
        _check_policy(augment.auto_augment, colour[0])
        _allow_posterize_to_black(colour[0])
        colour.insert(0, to_8bit)
    transform = Compose([partial(to_channels, in_chans=config.in_chans), *geometry, *colour, *finish])
    _try_out(transform)
    return transform


def resized_side(config: DataConfig) -> int:
    """Length in pixels that `eval_transform` resizes an image's shorter side to; training resizes to at most that."""
    return math.floor(config.img_size / config.crop_pct)


def to_channels(image: Image.Image | Tensor, in_chans: int) -> Image.Image | Tensor:
    """Converts an image to grey (luma of ITU-R 601-2) or RGB, and repeats the channel of a tensor `in_chans` times."""
    if isinstance(image, Tensor):
        return image.repeat(in_chans, 1, 1)
    return image.convert("L" if in_chans == 1 else "RGB")


def to_8bit(image: Image.Image | Tensor) -> Image.Image:
    """Converts a tensor in [0, 1] to an eight-bit image, as timm's policies need; other images are unchanged."""
    return to_pil_image(image.mul(255).round().byte()) if isinstance(image, Tensor) else image


def _check_policy(name: str, policy: Any) -> None:
    """Checks that a policy applies no more operations to an image than one that is meant."""
    for attribute, what in (("num_layers", "operations in a row"), ("width", "chains"), ("depth", "operations")):
        if (number := getattr(policy, attribute, 0)) > MOST_OPERATIONS:
            raise RequestError(
                f"data.augment.auto_augment={show(name)}: {number} {what} are too many, of at most {MOST_OPERATIONS}"
            )


def _try_out(transform: Compose) -> None:
    """Transforms a black image: some settings fail only when random numbers are drawn; no random state changes."""
    with own_random_states():
        try:
            transform(Image.new("RGB", (16, 16)))
        except Exception as error:  # of timm, torchvision, NumPy or Pillow
            raise RequestError(f"data.augment: an image cannot be augmented like this: {first_line(error)}") from error


def _allow_posterize_to_black(policy: Any) -> None:
    """Replaces timm's posterize in a policy: it may keep 0 bits, which Pillow refuses from version 13 on."""
    for op in policy.ops if hasattr(policy, "ops") else chain.from_iterable(policy.policy):
        if op.name.startswith("Posterize"):
            op.aug_fn = posterize


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """timm's posterize, and for 0 bits the black image that Pillow returned before version 13."""
    return timm_posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def _timm_train_stages(config: DataConfig) -> tuple[list[Any], list[Any], list[Any]]:
    """The steps of timm's training transform: [crop, flip], [colour or policy], [to tensor, normalise, erase]."""
    augment = config.augment
    mean, std = channel_statistics(config)
    scale, ratio = _bounds("scale", augment.scale), _bounds("ratio", augment.ratio)
    try:
        stages = create_transform(
            config.img_size,
            is_training=True,
            separate=True,
            scale=scale,
            ratio=ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # timm takes None for off
            auto_augment=augment.auto_augment,
            interpolation=config.interpolation,
            mean=mean,
            std=std,
            re_prob=augment.reprob,
            re_mode=augment.remode,
        )
    except Exception as error:  # timm reports a policy that it cannot parse in many ways
        raise RequestError(
            f"data.augment.auto_augment={augment.auto_augment}: {first_line(error)}; a policy is, e.g., "
            "rand-m9-mstd0.5-inc1"
        ) from error
    geometry, colour, finish = (list(stage.transforms) for stage in stages)
    return geometry, colour, finish


def _bounds(name: str, values: list[float] | None) -> tuple[float, float] | None:
    """A range of `data.augment`, checked."""
    if values is None:
        return None
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise RequestError(f"data.augment.{name}={values}: give a positive lower and an upper bound")
    return values[0], values[1]


def channel_statistics(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel; a single configured value is used for all channels.

    Raises:
        RequestError: as in `eval_transform`.
    """
    chans = config.in_chans
    if chans not in (1, 3):
        raise RequestError(f"data.in_chans={chans}: images have 1 channel (grey) or 3 (RGB)")
    for name, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (1, chans):
            raise RequestError(
                f"data.{name} has {len(values)} values, data.in_chans={chans}: give one value, or one per channel"
            )
    return tuple(config.mean * (chans // len(config.mean))), tuple(config.std * (chans // len(config.std)))


def _fixed_interpolation(config: DataConfig) -> str:
    """The interpolation of resizing other than RandomResizedCrop, which alone supports `random`."""
    return "bicubic" if config.interpolation == "random" else config.interpolation
