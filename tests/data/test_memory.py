"""Batches of small sets equal what one image at a time gives, but for what is drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sequencer.config.request import compose, to_config
from sequencer.config.schema import AugmentConfig, DataConfig
from sequencer.data import DataModule, ReadableSet, collate_readable, open_dataset
from sequencer.data.memory import GOLDEN, Held, MemoryEvalSet, MemorySet, _mix, is_held
from sequencer.data.seeding import SeededSet
from sequencer.data.transforms import eval_transform, train_transform

PLAIN = AugmentConfig()


def data(name: str, root: object, augment: AugmentConfig = PLAIN) -> DataConfig:
    """A set's own size and statistics."""
    config = to_config(compose([f"data={name}", f"data.root={root}", "data.num_workers=0"])).data
    return replace(config, augment=augment, batch_size=8)


def opened(config: DataConfig):
    return open_dataset(config, "train", train_transform(config))


def one_by_one(config: DataConfig, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*SeededSet(opened(config), seed=0).__getitems__(keys), strict=True)
    return torch.stack(images), torch.tensor(labels)


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_plain_images_are_the_same_bit_for_bit(name, made_root):
    config = data(name, made_root)
    images = opened(config)
    assert is_held(images, config)
    keys = [(0, index) for index in (5, 0, 17, 5)]
    found, labels = MemorySet(Held(images, config), config, seed=0).__getitems__(keys)
    expected, expected_labels = one_by_one(config, keys)
    assert torch.equal(found, expected)
    assert torch.equal(labels, expected_labels)


def test_real_images_too(cifar10_root):
    config = data("cifar10", cifar10_root)
    keys = [(0, index) for index in range(0, 45_000, 900)]
    found, labels = MemorySet(Held(opened(config), config), config, seed=0).__getitems__(keys)
    expected, expected_labels = one_by_one(config, keys)
    assert torch.equal(found, expected)
    assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_evaluation_images_are_the_same_bit_for_bit(name, made_root):
    config = data(name, made_root)
    module = DataModule(config, seed=0)
    module.setup()
    images = open_dataset(config, "test", eval_transform(config))
    loader = module.test_dataloader()
    assert isinstance(loader.dataset, MemoryEvalSet)
    found = [torch.cat(parts) for parts in zip(*loader, strict=True)]
    expected = collate_readable(ReadableSet(images).__getitems__(range(len(images))))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_batches(noise):
    config, held = noise
    keys = [(2, index) for index in range(50)]
    there = MemorySet(Held(opened(config), config, torch.device("cuda")), config, seed=3)
    found, labels = there.__getitems__(keys)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), held.__getitems__(keys)[0])
    assert torch.equal(labels.cpu(), held.__getitems__(keys)[1])


@pytest.fixture
def noise(made_root) -> tuple[DataConfig, MemorySet]:
    """CIFAR-10's layout with 90 images of noise, cropped and flipped."""
    config = data("cifar10", made_root, AugmentConfig(crop_padding=2, hflip=0.5))
    images = opened(config)
    images.source.data = np.random.RandomState(0).randint(256, size=images.source.data.shape, dtype=np.uint8)
    return config, MemorySet(Held(images, config), config, seed=3)


def test_every_image_is_one_of_its_crops(noise):
    config, held = noise
    plain = MemorySet(Held(opened(config), config), replace(config, augment=PLAIN), seed=3)
    black = -torch.tensor(config.mean).view(3, 1, 1) / torch.tensor(config.std).view(3, 1, 1)
    seen = []
    for index in range(len(held)):
        (found, *_), _ = held.__getitems__([(1, index)])
        (image, *_), _ = plain.__getitems__([(1, index)])
        padded = F.pad(image - black, [2] * 4) + black
        crops = {
            (top, left, flipped): (view.flip(2) if flipped else view)
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
            for view in [padded[:, top : top + 32, left : left + 32]]
        }
        (name,) = (name for name, crop in crops.items() if torch.allclose(crop, found, atol=1e-5))
        seen.append(name)
    tops, lefts, flips = zip(*seen, strict=True)
    assert set(tops) == set(lefts) == set(range(5))
    assert 0.3 < np.mean(flips) < 0.7


def test_what_is_drawn_is_uniform(noise):
    _, held = noise
    position = torch.arange(25.0).view(1, 1, 5, 5).expand(5000, 1, 5, 5)
    counts = torch.zeros(25)
    for epoch in range(4):
        states = _mix(_mix(held.seed + torch.full((5000,), epoch) * GOLDEN) + torch.arange(5000) * GOLDEN)
        crops = held._moved(position, states)[:, 0]
        counts += torch.bincount(crops[:, 2, 2].long(), minlength=25)  # the middle pixel tells the crop
    deviation = (20_000 * (1 / 25) * (24 / 25)) ** 0.5
    assert counts.sum() == 20_000
    assert (counts - 800).abs().max() < 4 * deviation
    assert counts.sub(800).square().mean().sqrt() > 0.3 * deviation  # and not laid out evenly


def test_what_is_drawn_depends_on_seed_epoch_and_index_alone(noise):
    config, held = noise
    keys = [(4, index) for index in range(20)]
    torch.manual_seed(0)
    together = held.__getitems__(keys)[0]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    apart = torch.cat([held.__getitems__([key])[0] for key in reversed(keys)]).flip(0)
    assert torch.equal(together, apart)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(together, held.__getitems__([(5, index) for _, index in keys])[0])
    other = MemorySet(Held(opened(config), config), config, seed=4)
    assert not torch.equal(together, other.__getitems__(keys)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": 40},
        {"in_chans": 1, "mean": [0.5], "std": [0.5]},
        {"augment": AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1")},
        {"augment": AugmentConfig(scale=[0.5, 1.0])},
        {"augment": AugmentConfig(color_jitter=0.1)},
        {"augment": AugmentConfig(reprob=0.1)},
    ],
)
def test_the_rest_is_done_one_by_one(change, made_root):
    config = replace(data("cifar10", made_root), **change)
    module = DataModule(config, seed=0)
    module.setup()
    loader = module.train_dataloader()
    assert isinstance(loader.dataset, SeededSet)
    assert next(iter(loader))[0].shape == (8, config.in_chans, config.img_size, config.img_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_served_by_the_loader(workers, made_root):
    config = replace(data("cifar10", made_root, AugmentConfig(crop_padding=4, hflip=0.5)), num_workers=workers)
    module = DataModule(config, seed=0)
    module.setup()
    loader = module.train_dataloader()
    assert isinstance(loader.dataset, MemorySet)
    batches = list(loader)
    assert [images.shape for images, _ in batches] == [(8, 3, 32, 32)] * (90 // 8)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, loader, strict=True))
    keys = list(loader.sampler)[8:16]
    assert torch.equal(batches[1][1], torch.from_numpy(module.train_set.labels)[[index for _, index in keys]])
