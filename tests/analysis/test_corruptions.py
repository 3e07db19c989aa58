"""Corruptions in the manner of CIFAR-10-C."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from sequencer.analysis.corruptions import CORRUPTIONS, SEVERITIES, corrupt

SIDE = 32


@pytest.fixture(scope="module")
def image():
    """A smooth colour image that uses the whole range."""
    values = gaussian_filter(np.random.default_rng(0).random((SIDE, SIDE, 3)), (2, 2, 0))
    return np.round(np.interp(values, (values.min(), values.max()), (0, 255))).astype(np.uint8)


def change(image, name, severity):
    return float(np.abs(corrupt(image, name, severity, 0, 0).astype(float) - image).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_depends_on_its_arguments_alone(name, image):
    found = [corrupt(image, name, severity, 0, 5) for severity in SEVERITIES]
    np.random.seed(1)
    for severity, corrupted in zip(SEVERITIES, found, strict=True):
        assert corrupted.shape == image.shape
        assert corrupted.dtype == np.uint8
        np.testing.assert_array_equal(corrupt(image, name, severity, 0, 5), corrupted)
    assert len({corrupted.tobytes() for corrupted in (image, *found)}) == 6
    is_random = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    # the offsets of a motion blur are whole pixels, so that similar angles have the same result
    of_seeds = {corrupt(image, name, 4, seed, 5).tobytes() for seed in range(6)}
    of_images = {corrupt(image, name, 4, 0, index).tobytes() for index in range(6)}
    for results in (of_seeds, of_images):
        assert len(results) > 3 if is_random else len(results) == 1


# without elastic_transform: by its published constants the affine part shrinks while the elastic one grows
@pytest.mark.parametrize("name", sorted(CORRUPTIONS.keys() - {"elastic_transform"}))
def test_the_highest_severity_changes_more_than_the_lowest(name, image):
    assert change(image, name, 5) > change(image, name, 1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grey_images(name, image):
    corrupted = corrupt(image[..., :1], name, 3, 0, 0)
    assert corrupted.shape == (SIDE, SIDE, 1)
    assert (corrupted != image[..., :1]).any()


def test_noise_has_the_published_deviation():
    grey = np.full((256, 256, 3), 128, np.uint8)
    for severity, deviation in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        assert corrupt(grey, "gaussian_noise", severity, 0, 0).std() / 255 == pytest.approx(deviation, rel=0.02)
    for severity, photons in zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True):
        expected = np.sqrt(128 / 255 / photons)  # of a Poisson variable
        assert corrupt(grey, "shot_noise", severity, 0, 0).std() / 255 == pytest.approx(expected, rel=0.02)
    for severity, amount in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        corrupted = corrupt(grey, "impulse_noise", severity, 0, 0)
        assert (corrupted == 0).mean() == pytest.approx(amount / 2, rel=0.1)
        assert (corrupted == 255).mean() == pytest.approx(amount / 2, rel=0.1)


def test_contrast_and_brightness_by_hand():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = (100, 50, 0)
    assert corrupt(image, "contrast", 2, 0, 0)[:, 0].tolist() == [[75, 37, 0], [25, 12, 0]]  # half way to the means
    # severity 5 adds 0.3 to the value: 100 becomes 176.5, and black becomes grey of 76.5
    assert corrupt(image, "brightness", 5, 0, 0)[:, 0].tolist() == [[176, 88, 0], [76, 76, 76]]


def test_motion_blur_keeps_a_constant_image_and_spreads_a_point_to_one_side():
    np.testing.assert_array_equal(corrupt(np.full((SIDE, SIDE, 3), 77, np.uint8), "motion_blur", 5, 0, 0), 77)
    point = np.zeros((SIDE, SIDE, 1), np.uint8)
    point[16, 16] = 255
    rows, columns = np.nonzero(corrupt(point, "motion_blur", 3, 0, 0)[..., 0])
    assert columns.max() == 16  # an angle from -45 to 45 degrees
    assert columns.min() < 14
    assert len(rows) > 4


def test_fog_lies_between_none_and_its_amount():
    """White stays white where the fog is densest, and is divided by 1 + 1.5 where there is none."""
    corrupted = corrupt(np.full((SIDE, SIDE, 3), 255, np.uint8), "fog", 5, 0, 0)
    assert (corrupted.min(), corrupted.max()) == (102, 255)
    assert (corrupted == corrupted[..., :1]).all()
    assert len(np.unique(corrupted)) > 50


def test_glass_blur_moves_pixels_by_at_most_its_distance():
    ramp = np.repeat(np.arange(SIDE, dtype=np.uint8)[:, None] * 8, SIDE, axis=1)[..., None]
    moved = corrupt(ramp, "glass_blur", 1, 0, 0).astype(int) - ramp
    assert moved.max() <= 8  # rounding aside, pixels come from the row itself or the one above
    assert moved.min() < 0
