"""The evaluation transform equals timm's, and the training transform applies what the configuration names."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import to_tensor

from sequencer.config.errors import RequestError
from sequencer.config.schema import AugmentConfig, DataConfig
from sequencer.data import eval_transform, train_transform
from sequencer.data.transforms import posterize

GREY: dict[str, Any] = {"in_chans": 1, "mean": [0.5], "std": [0.25]}


def photograph(width, height, seed=0):
    """An image of smooth colours with noise, which both resampling and cropping change."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 180, width)[None, :, None] * np.ones((height, 1, 3))
    return Image.fromarray((ramp + rng.integers(0, 75, (height, width, 3))).astype(np.uint8))


def seeded(transform, image, seed=0):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return transform(image)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("img_size", "crop_pct"), [(224, 0.875), (224, 1.0), (32, 0.9), (392, 1.0)])
@pytest.mark.parametrize("size", [(256, 256), (300, 200), (57, 91)])
def test_evaluation_equals_timm(interpolation, img_size, crop_pct, size):
    config = DataConfig(name="imagenet", img_size=img_size, crop_pct=crop_pct, interpolation=interpolation)
    timm_transform = create_transform(
        (3, img_size, img_size),
        is_training=False,
        interpolation=interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
        crop_pct=crop_pct,
    )
    image = photograph(*size)
    assert torch.equal(eval_transform(config)(image), timm_transform(image))


@pytest.mark.parametrize("build", [eval_transform, train_transform])
def test_images_of_the_right_size_are_not_resampled(build):
    digit = torch.arange(64).remainder(17).div(16).reshape(1, 8, 8)
    config = DataConfig(name="digits", img_size=8, in_chans=1, mean=[0.0], std=[1.0], interpolation="random")
    assert torch.equal(build(config)(digit), digit)
    image = photograph(32, 32)
    config = DataConfig(name="cifar10", img_size=32, mean=[0.0], std=[1.0])
    assert torch.equal(build(config)(image), to_tensor(image))


@pytest.mark.parametrize("build", [eval_transform, train_transform])
def test_grey_and_rgb_become_each_other(build):
    colour, grey = photograph(32, 32), photograph(32, 32).convert("L")
    digit = torch.rand(1, 32, 32)
    plain = DataConfig(name="cifar10", img_size=32, mean=[0.0], std=[1.0])
    to_grey, to_rgb = build(dataclasses.replace(plain, in_chans=1)), build(plain)
    assert torch.equal(to_grey(colour), to_tensor(grey))
    assert torch.equal(to_rgb(grey), to_tensor(grey).repeat(3, 1, 1))
    assert torch.equal(to_rgb(digit), digit.repeat(3, 1, 1))


def test_normalisation_broadcasts_one_value():
    image = photograph(32, 32)
    one = DataConfig(name="cifar10", img_size=32, mean=[0.5], std=[0.25])
    three = dataclasses.replace(one, mean=[0.5] * 3, std=[0.25] * 3)
    assert torch.equal(eval_transform(one)(image), (to_tensor(image) - 0.5) / 0.25)
    assert torch.equal(eval_transform(one)(image), eval_transform(three)(image))


def test_training_without_a_crop_keeps_the_whole_image():
    config = DataConfig(name="imagefolder", img_size=64, mean=[0.0], std=[1.0])
    image = photograph(200, 100)
    expected = to_tensor(image.resize((64, 64), Image.Resampling.BICUBIC))
    assert torch.allclose(train_transform(config)(image), expected, atol=1e-6)


def test_random_resized_crop_equals_timm():
    augment = AugmentConfig(scale=[0.08, 1.0], hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", reprob=1.0)
    config = DataConfig(name="imagenet", img_size=64, augment=augment)
    timm_transform = create_transform(
        64,
        is_training=True,
        ratio=(0.75, 1.3333),
        auto_augment=augment.auto_augment,
        interpolation="bicubic",
        mean=tuple(config.mean),
        std=tuple(config.std),
        re_prob=1.0,
        re_mode="pixel",
    )
    image = photograph(200, 100)
    for seed in range(5):
        assert torch.equal(seeded(train_transform(config), image, seed), seeded(timm_transform, image, seed))


def test_flip_and_padded_crop_move_pixels_only():
    image = to_tensor(photograph(32, 32))
    plain = DataConfig(name="cifar10", img_size=32, mean=[0.0], std=[1.0])
    flip = train_transform(dataclasses.replace(plain, augment=AugmentConfig(hflip=1.0)))
    assert torch.equal(flip(photograph(32, 32)), image.flip(-1))
    crop = train_transform(dataclasses.replace(plain, augment=AugmentConfig(crop_padding=4)))
    cropped = seeded(crop, photograph(32, 32))
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    assert any(torch.equal(cropped, window) for window in windows)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original-mstd0.5", "3a", "augmix-m5-w4-d2"])
@pytest.mark.parametrize("statistics", [GREY, {}], ids=["grey", "rgb"])
@pytest.mark.parametrize("kind", ["photograph", "digit"])
def test_policies_work_on_every_kind_of_image(policy, statistics, kind):
    augment = AugmentConfig(auto_augment=policy, color_jitter=0.4)
    transform = train_transform(DataConfig(name="digits", img_size=16, augment=augment, **statistics))
    image = photograph(16, 16) if kind == "photograph" else torch.rand(1, 16, 16)
    for seed in range(20):
        result = seeded(transform, image, seed)
        assert result.shape == (statistics.get("in_chans", 3), 16, 16)
        assert result.dtype == torch.float32


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0"])
@pytest.mark.parametrize("statistics", [GREY, {}], ids=["grey", "rgb"])
def test_strongest_policies_never_fail(policy, statistics):
    augment = AugmentConfig(auto_augment=policy)
    transform = train_transform(DataConfig(name="cifar10", img_size=8, augment=augment, **statistics))
    image = photograph(8, 8)
    for seed in range(300):
        seeded(transform, image, seed)


def test_posterize_to_no_bits_is_black():
    for image in (photograph(8, 8), photograph(8, 8).convert("L")):
        assert not np.asarray(posterize(image, 0)).any()
        assert np.array_equal(np.asarray(posterize(image, 4)), np.asarray(image) & 0xF0)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_and_jitter_leave_the_source_as_it_was(mode):
    digit = torch.rand(1, 16, 16)
    before = digit.clone()
    augment = AugmentConfig(color_jitter=0.4, reprob=1.0, remode=mode)
    transform = train_transform(DataConfig(name="digits", img_size=16, augment=augment, **GREY))
    assert not torch.equal(seeded(transform, digit), (digit - 0.5) / 0.25)
    assert torch.equal(digit, before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"in_chans": 2}, "data.in_chans=2: images have 1 channel"),
        ({"in_chans": 1}, "data.mean has 3 values, data.in_chans=1"),
        ({"std": [1.0, 1.0]}, "data.std has 2 values"),
        ({"augment": AugmentConfig(auto_augment="nonsense")}, "data.augment.auto_augment=nonsense: .*rand-m9"),
        ({"augment": AugmentConfig(auto_augment="rand-x9")}, "data.augment.auto_augment=rand-x9"),
        ({"augment": AugmentConfig(scale=[0.5])}, r"data.augment.scale=\[0.5\]: give"),
        ({"augment": AugmentConfig(ratio=[2.0, 1.0])}, "data.augment.ratio="),
    ],
)
def test_requests_that_make_no_sense(changes, match):
    with pytest.raises(RequestError, match=match):
        train_transform(DataConfig(name="cifar10", img_size=32, **changes))
