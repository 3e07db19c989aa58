"""Mixup and CutMix of batches of any size."""

import numpy as np
import pytest
import torch

from sequencer.config.schema import AugmentConfig
from sequencer.data import build_mixup

BOTH = AugmentConfig(mixup=0.8, cutmix=1.0, smoothing=0.1)


def batch(size):
    """Image `i` has the value `i` everywhere and the label `i`, so that pixels tell the share of each label."""
    labels = torch.arange(size)
    return labels.float().view(-1, 1, 1, 1).repeat(1, 3, 8, 8), labels


def mixer(augment, num_classes):
    mix = build_mixup(augment, num_classes)
    assert mix is not None
    return mix


def test_without_mixup_and_cutmix_there_is_no_function():
    assert build_mixup(AugmentConfig(smoothing=0.1), 10) is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("augment", [BOTH, AugmentConfig(mixup=0.2), AugmentConfig(cutmix=1.0)])
def test_any_batch_size(size, augment):
    mix = mixer(augment, 10)
    np.random.seed(0)
    for _ in range(20):
        images, targets = mix(*batch(size))
        assert images.shape == (size, 3, 8, 8)
        assert targets.shape == (size, 10)
        assert torch.allclose(targets.sum(1), torch.ones(size))
        assert torch.all(targets >= 0)


@pytest.mark.parametrize("augment", [AugmentConfig(mixup=1.0), AugmentConfig(cutmix=1.0)])
def test_targets_are_the_shares_of_pixels(augment):
    mix, mixed = mixer(augment, 7), 0
    np.random.seed(1)
    for _ in range(10):
        images, targets = mix(*batch(7))
        assert torch.allclose(images.mean((1, 2, 3)), targets @ torch.arange(7.0), atol=1e-5)
        mixed += not torch.equal(targets, torch.eye(7))
    assert mixed >= 5  # a box of CutMix may be empty


def test_last_of_an_odd_batch_is_only_smoothed():
    np.random.seed(0)
    images, targets = mixer(BOTH, 10)(*batch(5))
    assert torch.equal(images[4], torch.full((3, 8, 8), 4.0))
    assert torch.allclose(targets[4], torch.full((10,), 0.01) + 0.9 * torch.eye(10)[4])


def test_probability_zero_mixes_nothing():
    images, targets = mixer(AugmentConfig(mixup=1.0, mixup_prob=0.0), 4)(*batch(4))
    assert torch.equal(images, batch(4)[0])
    assert torch.equal(targets, torch.eye(4))


def test_repeatable_from_numpys_state():
    mix = mixer(BOTH, 10)
    results = []
    for _ in range(2):
        np.random.seed(3)
        results.append(mix(*batch(6)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
