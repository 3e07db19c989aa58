"""What the DataModule serves, and that it is a function of (seed, epoch) whatever the workers and the run before."""

import dataclasses
import random
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from sequencer.config.errors import RequestError
from sequencer.config.schema import AugmentConfig, DataConfig
from sequencer.data import DataModule, open_dataset
from sequencer.data.seeding import EpochSampler, SeededSet

AUGMENT = AugmentConfig(scale=[0.3, 1.0], hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)


def ready(config, seed=0):
    module = DataModule(config, seed)
    module.setup()
    return module


def epochs(config, numbers, seed=0):
    """Batches of the given epochs from one loader, so that its workers persist."""
    loader = ready(config, seed).train_dataloader()
    result = []
    for number in numbers:
        loader.sampler.set_epoch(number)
        images, labels = zip(*loader, strict=True)
        result.append((torch.cat(images), torch.cat(labels)))
    return result


def test_digits_are_served(digits):
    module = ready(digits)
    assert module.class_names == [str(i) for i in range(10)]
    assert module.num_classes == 10
    assert (len(module.train_set), len(module.val_set), len(module.test_set)) == (1295, 143, 359)
    images, labels = next(iter(module.train_dataloader()))
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (100, 1, 8, 8),
        torch.float32,
        (100,),
        torch.int64,
    )
    assert len(module.train_dataloader()) == 12
    val_labels = torch.cat([labels for _, labels, _ in module.val_dataloader()])
    assert np.array_equal(val_labels, module.val_set.labels)
    assert sum(len(labels) for _, labels, _ in module.test_dataloader()) == 359


def test_setup_opens_once(digits):
    module = ready(digits)
    train_set = module.train_set
    module.setup("fit")
    assert module.train_set is train_set


@pytest.mark.parametrize(("batch_size", "sizes"), [(2000, [1295]), (1295, [1295]), (1000, [1000])])
def test_only_an_incomplete_last_batch_is_dropped(digits, batch_size, sizes):
    loader = ready(dataclasses.replace(digits, batch_size=batch_size)).train_dataloader()
    assert [len(labels) for _, labels in loader] == sizes


def test_training_order_and_augmentation_depend_on_seed_and_epoch(digits):
    config = dataclasses.replace(digits, augment=AUGMENT, batch_size=1295)
    (images, labels), (again, _), (other_images, other_labels) = epochs(config, [0, 0, 1])
    assert torch.equal(images, again)
    assert not torch.equal(labels, other_labels)
    assert torch.equal(labels.bincount(), other_labels.bincount())
    other_seed = epochs(config, [0], seed=1)[0]
    assert not torch.equal(labels, other_seed[1])
    # the same images, sorted by label and mean, are augmented otherwise in another epoch
    assert not torch.equal(images.mean((1, 2, 3)).sort()[0], other_images.mean((1, 2, 3)).sort()[0])


def test_workers_change_nothing(digits):
    config = dataclasses.replace(digits, augment=AUGMENT)
    alone = epochs(config, [0, 1, 5])
    with_workers = epochs(dataclasses.replace(config, num_workers=2), [0, 1, 5])
    for (images, labels), (worker_images, worker_labels) in zip(alone, with_workers, strict=True):
        assert torch.equal(images, worker_images)
        assert torch.equal(labels, worker_labels)


def test_an_item_depends_on_its_key_alone(digits):
    module = ready(dataclasses.replace(digits, augment=AUGMENT))
    seeded = SeededSet(module.train_set, seed=3)
    keys = [(0, 7), (0, 8), (1, 7)]
    together = [image for image, _ in seeded.__getitems__(keys)]
    apart = [seeded.__getitems__([key])[0][0] for key in reversed(keys)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(together[0], SeededSet(module.train_set, seed=4).__getitems__([(0, 7)])[0][0])


def test_global_random_states_are_left_alone(digits):
    module = ready(dataclasses.replace(digits, augment=AUGMENT))

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def start():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    start()
    expected = draw()
    start()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        next(iter(loader))
    assert draw() == expected


def test_sampler_covers_every_index():
    sampler = EpochSampler(50, 10, seed=0, epoch=2)
    assert len(sampler) == 50
    assert sorted(sampler) == [(2, index) for index in range(50)]
    # seed + epoch would make these two the same
    assert [i for _, i in EpochSampler(50, 10, seed=1)] != [i for _, i in EpochSampler(50, 10, seed=0, epoch=1)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_every_batch(world_size):
    whole = EpochSampler(50, 12, seed=0)
    shares = [EpochSampler(50, 12, 0, rank, world_size) for rank in range(world_size)]
    assert [len(share) for share in shares] == [48 // world_size] * world_size
    own = 12 // world_size
    for batch in range(4):
        together = [key for share in shares for key in list(share)[batch * own : (batch + 1) * own]]
        assert sorted(together) == sorted(list(whole)[batch * 12 : (batch + 1) * 12])


def test_sampler_goes_on_within_an_epoch():
    whole = EpochSampler(50, 10, seed=0, epoch=1)
    rest = EpochSampler(50, 10, seed=0, epoch=1, batches_done=3)
    assert list(rest) == list(whole)[30:]
    assert len(rest) == 50
    rest.set_epoch(2)
    whole.set_epoch(2)
    assert list(rest) == list(whole)


class Recorder(pl.LightningModule):
    """Keeps the labels of every batch, by epoch."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)
        self.seen = {}

    def training_step(self, batch, _):
        images, labels = batch
        self.seen.setdefault(self.current_epoch, []).append(labels.tolist())
        return torch.nn.functional.cross_entropy(self.head(images.flatten(1)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(config, folder, max_epochs, ckpt_path=None):
    model = Recorder()
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
    )
    with warnings.catch_warnings():  # Lightning's advice on numbers of workers, and on a folder that is not empty
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=DataModule(config, 0), ckpt_path=ckpt_path)
    return model.seen


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_its_own_epochs(digits, tmp_path, num_workers):
    config = dataclasses.replace(digits, num_workers=num_workers)
    whole = fit(config, tmp_path, 3)
    assert whole[0] != whole[1] != whole[2]
    resumed = fit(config, tmp_path / "resumed", 3, tmp_path / "epoch=0.ckpt")
    assert resumed == {1: whole[1], 2: whole[2]}


def test_photographs_are_served(photographs_root):
    config = DataConfig(
        name="imagefolder", root=str(photographs_root), img_size=64, crop_pct=0.875, batch_size=8, num_workers=0
    )
    module = ready(dataclasses.replace(config, augment=AUGMENT))
    assert (module.num_classes, module.test_set) == (2, None)
    images, labels = next(iter(module.train_dataloader()))
    assert (images.shape, labels.shape) == ((8, 3, 64, 64), (8,))
    assert len(module.val_dataloader()) == 1
    with pytest.raises(RequestError, match=r"no test part in data\.root="):
        module.test_dataloader()


def test_open_dataset_serves_evaluation_alone(digits):
    test_set = open_dataset(digits, "test", transform=lambda image: image.sum().item())
    assert all(isinstance(total, float) for total, _ in (test_set[i] for i in range(3)))
