"""Batches of sets in memory: the pixels of one image at a time, and crops and flips that depend on the key alone."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sequencer.config.composition import compose
from sequencer.config.schema import AugmentConfig, DataConfig
from sequencer.data import DataModule, MemorySplit, open_split
from sequencer.data.indexed import ReadableSet, collate_readable
from sequencer.data.memory import MemoryEvalSet, MemoryTrainSet, StoredImages, crop_and_flip
from sequencer.data.seeding import SeededSet
from sequencer.data.transforms import eval_transform, train_transform

MOVED = AugmentConfig(crop_padding=2, hflip=0.5)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def opened(config: DataConfig) -> MemorySplit:
    return open_split(config, "train", train_transform(config))


def batches_of(split: MemorySplit, config: DataConfig, seed: int = 3, device: str = "cpu") -> MemoryTrainSet:
    return MemoryTrainSet(StoredImages(split, config, torch.device(device)), config.augment, seed)


def one_by_one(config: DataConfig, keys: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*SeededSet(opened(config), seed=0).__getitems__(keys), strict=True)
    return torch.stack(images), torch.tensor(labels)


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_images_without_augmentation_are_the_same_bit_for_bit(name, in_memory):
    config = in_memory(name)
    keys = [(0, index) for index in (5, 0, 17, 5)]
    found, labels = batches_of(opened(config), config).__getitems__(keys)
    expected, expected_labels = one_by_one(config, keys)
    assert torch.equal(found, expected)
    assert torch.equal(labels, expected_labels)


@pytest.mark.slow
def test_real_images_too(cifar10_root):
    config = replace(compose(["data=cifar10", f"data.root={cifar10_root}"]).data, augment=AugmentConfig())
    keys = [(0, index) for index in range(0, 45_000, 900)]
    found, labels = batches_of(opened(config), config).__getitems__(keys)
    expected, expected_labels = one_by_one(config, keys)
    assert torch.equal(found, expected)
    assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_evaluation_images_are_the_same_bit_for_bit(name, in_memory):
    config = in_memory(name)
    split = open_split(config, "test", eval_transform(config))
    loader = split.evaluation_loader(config)
    assert isinstance(loader.dataset, MemoryEvalSet)
    found = [torch.cat(tensors) for tensors in zip(*loader, strict=True)]
    expected = collate_readable(ReadableSet(split).__getitems__(range(len(split))))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def noise(in_memory) -> tuple[DataConfig, MemorySplit]:
    """90 training images of noise of CIFAR-10's shape, to be cropped and flipped."""
    config = in_memory("cifar10", MOVED)
    split = opened(config)
    split.data = torch.from_numpy(np.random.RandomState(0).randint(256, size=split.data.shape, dtype=np.uint8))
    return config, split


@GPU
def test_a_gpu_makes_the_same_batches(noise):
    config, split = noise
    keys = [(2, index) for index in range(50)]
    found, labels = batches_of(split, config, device="cuda").__getitems__(keys)
    expected, expected_labels = batches_of(split, config).__getitems__(keys)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)
    assert torch.equal(labels.cpu(), expected_labels)


@pytest.mark.parametrize(("free", "device"), [(1_200_000, "cuda"), (1_000_000, "cpu")])
def test_images_are_kept_on_a_gpu_with_room_for_them(noise, monkeypatch, free, device):
    _, split = noise  # of 276 kB, of which a quarter of the free memory is the limit
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80_000_000_000))
    assert split._device(torch.device("cuda")).type == device
    assert split._device(torch.device("cpu")).type == "cpu"


@GPU
def test_images_on_a_gpu_are_served_without_workers(noise):
    config, split = noise
    loader = split.training_loader(replace(config, num_workers=2), seed=3, device=torch.device("cuda"))
    assert (loader.dataset.stored.device.type, loader.num_workers, loader.pin_memory) == ("cuda", 0, False)
    assert next(iter(loader))[0].is_cuda


def test_every_image_is_one_of_its_crops(noise):
    config, split = noise
    moved, plain = batches_of(split, config), batches_of(split, replace(config, augment=AugmentConfig()))
    black = -torch.tensor(config.mean).view(3, 1, 1) / torch.tensor(config.std).view(3, 1, 1)
    seen = []
    for index in range(len(moved)):
        (found, *_), _ = moved.__getitems__([(1, index)])
        (image, *_), _ = plain.__getitems__([(1, index)])
        padded = F.pad(image - black, [2] * 4) + black
        crops = {
            (top, left, flipped): (view.flip(2) if flipped else view)
            for top, left, flipped in product(range(5), range(5), (False, True))
            for view in [padded[:, top : top + 32, left : left + 32]]
        }
        (name,) = (name for name, crop in crops.items() if torch.allclose(crop, found, atol=1e-5))
        seen.append(name)
    tops, lefts, flips = zip(*seen, strict=True)
    assert set(tops) == set(lefts) == set(range(5))
    assert 0.3 < np.mean(flips) < 0.7


def test_crops_and_flips_are_those_asked_for():
    image = torch.arange(12.0).view(1, 1, 3, 4).expand(2, 1, 3, 4)
    tops, lefts = torch.tensor([0, 2]), torch.tensor([2, 1])
    first, second = crop_and_flip(image, tops, lefts, torch.tensor([False, True]), padding=1)[:, 0]
    assert first.tolist() == [[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]]
    assert second.tolist() == [[7, 6, 5, 4], [11, 10, 9, 8], [0, 0, 0, 0]]


def drawn(augment: AugmentConfig, epoch: int, number: int = 5000) -> torch.Tensor:
    """Top, left and flip of every image."""
    config = DataConfig(name="digits", in_chans=1, img_size=5, mean=[0.0], std=[1.0], augment=augment)
    moved = batches_of(MemorySplit(torch.zeros(number, 1, 5, 5), np.zeros(number), ["a"], "made"), config)
    moved._draw(epoch)
    return torch.stack([moved._tops, moved._lefts, moved._flips])


def test_crops_and_flips_are_uniform_and_independent():
    tops, lefts, flips = torch.cat([drawn(MOVED, epoch) for epoch in range(4)], dim=1)
    counts = torch.bincount(10 * tops + 2 * lefts + flips, minlength=50)
    deviation = (20_000 * (1 / 50) * (49 / 50)) ** 0.5
    assert counts.sum() == 20_000
    assert (counts - 400).abs().max() < 4 * deviation
    assert counts.sub(400).square().float().mean().sqrt() > 0.3 * deviation  # drawn, not spaced evenly
    assert not torch.equal(drawn(MOVED, 0)[2], drawn(MOVED, 1)[2])


def test_the_probability_of_a_flip_is_the_one_asked_for():
    assert drawn(AugmentConfig(hflip=0.1), 0)[2].double().mean() == pytest.approx(0.1, abs=0.02)
    assert not drawn(AugmentConfig(crop_padding=1), 0)[2].any()


def test_crops_and_flips_depend_on_seed_epoch_and_index_alone(noise):
    config, split = noise
    moved, keys = batches_of(split, config), [(4, index) for index in range(20)]
    torch.manual_seed(0)
    together = moved.__getitems__(keys)[0]
    other_epoch = moved.__getitems__([(5, index) for _, index in keys])[0]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    apart = torch.cat([moved.__getitems__([key])[0] for key in reversed(keys)]).flip(0)
    assert torch.equal(together, apart)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(together, other_epoch)
    assert not torch.equal(together, batches_of(split, config, seed=4).__getitems__(keys)[0])
    assert torch.equal(together, batches_of(split, config).__getitems__(keys)[0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_ranks_workers_and_position_make_the_same_batches(noise, world_size):
    config, split = noise
    whole = split.training_loader(config, seed=3)
    whole.sampler.set_epoch(2)
    expected = list(whole)
    position = {"epoch": 2, "batches": 5, "reshuffles": []}
    config = replace(config, num_workers=2 * (world_size == 2))
    shares = [split.training_loader(config, 3, rank, world_size, position) for rank in range(world_size)]
    for share in shares:
        share.sampler.set_epoch(2)
    for batch, batches in enumerate(zip(*shares, strict=True), start=5):
        images = torch.stack([images for images, _ in batches], dim=1).flatten(0, 1)
        assert torch.equal(images, expected[batch][0])
    assert batch == len(expected) - 1


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
def test_other_sizes_and_augmentations_are_made_one_image_at_a_time(change, in_memory):
    config = replace(in_memory("cifar10"), **change)
    loader = opened(config).training_loader(config, seed=0)
    assert isinstance(loader.dataset, SeededSet)
    assert next(iter(loader))[0].shape == (8, config.in_chans, config.img_size, config.img_size)


def test_a_centre_crop_is_made_one_image_at_a_time(in_memory):
    config = replace(in_memory("cifar10"), crop_pct=0.5)
    split = open_split(config, "test", eval_transform(config))
    assert isinstance(split.evaluation_loader(config).dataset, ReadableSet)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_served_by_the_data_module(workers, in_memory):
    config = replace(in_memory("cifar10", AugmentConfig(crop_padding=4, hflip=0.5)), num_workers=workers)
    module = DataModule(config, seed=0)
    module.setup()
    loader = module.train_dataloader()
    assert isinstance(loader.dataset, MemoryTrainSet)
    batches = list(loader)
    assert [images.shape for images, _ in batches] == [(8, 3, 32, 32)] * (90 // 8)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, loader, strict=True))
    keys = list(loader.sampler)[8:16]
    assert torch.equal(batches[1][1], torch.from_numpy(module.train_set.labels)[[index for _, index in keys]])
    assert module.count_readable() == 110


def test_sets_in_memory_are_not_probed(in_memory):
    assert opened(in_memory("cifar10")).probe(500) == (0, [])


def test_a_batch_of_two_epochs_is_refused(noise):
    config, split = noise
    with pytest.raises(ValueError, match="unpack"):
        batches_of(split, config).__getitems__([(0, 1), (1, 1)])
