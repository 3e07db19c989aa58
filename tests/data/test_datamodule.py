"""What the DataModule serves, and that it is a function of (seed, epoch) for any workers, ranks and earlier epochs."""

import dataclasses
import functools
import io
import random
import warnings
from itertools import combinations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import track

from sequencer.config.errors import RequestError
from sequencer.config.schema import AugmentConfig, DataConfig
from sequencer.data import DataModule
from sequencer.data.seeding import EpochSampler, SeededSet
from sequencer.data.split import limit_workers

AUGMENT = AugmentConfig(scale=[0.3, 1.0], hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)


@pytest.fixture
def augmented(digits) -> DataConfig:
    """The digits, of which few are left to train, with every augmentation."""
    return dataclasses.replace(digits, augment=AUGMENT, val_fraction=0.9, batch_size=48)


def ready(config, seed=0, **options):
    module = DataModule(config, seed, **options)
    module.setup()
    return module


def epochs(config, numbers, seed=0):
    """The given epochs from one loader, so that its workers persist."""
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
    assert (images.shape, images.dtype) == ((100, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((100,), torch.int64)
    assert len(module.train_dataloader()) == 12
    for split, loader in ((module.val_set, module.val_dataloader()), (module.test_set, module.test_dataloader())):
        labels, indices = (torch.cat(column) for column in list(zip(*loader, strict=True))[1:])
        assert np.array_equal(labels, split.labels)
        assert indices.tolist() == list(range(len(split)))


@pytest.mark.parametrize("img_size", [8, 12])  # in batches and one image at a time
def test_the_data_set_of_a_loader_is_as_long_as_its_split(digits, img_size):
    module = ready(dataclasses.replace(digits, img_size=img_size))
    assert len(module.train_dataloader().dataset) == 1295
    assert len(module.val_dataloader().dataset) == 143


def test_setup_opens_once(digits):
    module = ready(digits)
    train_set = module.train_set
    module.setup("fit")
    assert module.train_set is train_set


@pytest.mark.parametrize(("batch_size", "sizes"), [(2000, [1295]), (1295, [1295]), (1000, [1000])])
def test_only_an_incomplete_last_batch_is_dropped(digits, batch_size, sizes):
    loader = ready(dataclasses.replace(digits, batch_size=batch_size)).train_dataloader()
    assert [len(labels) for _, labels in loader] == sizes


def test_training_order_and_augmentation_depend_on_seed_and_epoch(augmented):
    augmented = dataclasses.replace(augmented, batch_size=1000)
    (images, labels), (again, _), (other_images, other_labels) = epochs(augmented, [0, 0, 1])
    assert torch.equal(images, again)
    assert not torch.equal(labels, other_labels)
    assert torch.equal(labels.bincount(), other_labels.bincount())
    other_seed = epochs(augmented, [0], seed=1)[0]
    assert not torch.equal(labels, other_seed[1])
    # the same images in another epoch are augmented otherwise, whatever their order
    assert not torch.equal(images.mean((1, 2, 3)).sort()[0], other_images.mean((1, 2, 3)).sort()[0])


def test_workers_change_nothing(augmented):
    alone = epochs(augmented, [0, 1, 5])
    with_workers = epochs(dataclasses.replace(augmented, num_workers=2), [0, 1, 5])
    for (images, labels), (worker_images, worker_labels) in zip(alone, with_workers, strict=True):
        assert torch.equal(images, worker_images)
        assert torch.equal(labels, worker_labels)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_batch(augmented, world_size):
    whole = list(ready(augmented).train_dataloader())
    ranks = [ready(augmented, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = zip(*(module.train_dataloader() for module in ranks), strict=True)
    for (images, labels), parts in zip(whole, shares, strict=True):
        for rank, (own_images, own_labels) in enumerate(parts):
            assert torch.equal(own_images, images[rank::world_size])
            assert torch.equal(own_labels, labels[rank::world_size])
    assert all(module.images_of(0, 1) == ranks[0].images_of(0, 1) for module in ranks)


@pytest.mark.parametrize("crop_pct", [1.0, 0.8])  # in batches and one image at a time
def test_ranks_share_the_evaluation_images(digits, crop_pct):
    config = dataclasses.replace(digits, crop_pct=crop_pct)
    found = []
    for rank in range(3):
        module = ready(config, rank=rank, world_size=3)
        found.append(torch.cat([indices for _, _, indices in module.val_dataloader()]))
    assert [len(indices) for indices in found] == [48, 48, 47]
    assert torch.cat(found).sort()[0].tolist() == list(range(143))


def test_an_item_depends_on_its_key_alone(augmented):
    module = ready(augmented)
    seeded = SeededSet(module.train_set, seed=3)
    keys = [(0, 7), (0, 8), (1, 7)]
    together = [image for image, _ in seeded.__getitems__(keys)]
    apart = [seeded.__getitems__([key])[0][0] for key in reversed(keys)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(together[0], SeededSet(module.train_set, seed=4).__getitems__([(0, 7)])[0][0])


def test_global_random_states_are_left_alone(augmented):
    module = ready(augmented)

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def start():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    start()
    expected = draw()
    start()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        next(iter(loader))
    module.count_readable()
    assert draw() == expected


def test_the_progress_of_the_check_is_shown_only_on_request(digits, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=80)
    monkeypatch.setattr("sequencer.data.module.track", functools.partial(track, console=terminal))
    module = ready(digits)
    module.count_readable()
    assert terminal.file.getvalue() == ""
    module.count_readable(show_progress=True)
    printed = terminal.file.getvalue()
    assert all(f"checking {name} images" in printed for name in ("train", "val", "test"))


def test_sampler_covers_every_index():
    sampler = EpochSampler(50, 10, seed=0, epoch=2)
    assert len(sampler) == 50
    assert sorted(sampler) == [(2, index) for index in range(50)]
    # seed + epoch would make these two the same
    assert [i for _, i in EpochSampler(50, 10, seed=1)] != [i for _, i in EpochSampler(50, 10, seed=0, epoch=1)]


def test_the_order_of_an_epoch_never_changes():
    """A run that is resumed with a later version goes on in the same order."""
    order = EpochSampler(10, 3, seed=1, epoch=2, batches=1, reshuffles=[1])
    assert [order.images_of(2, batch) for batch in range(3)] == [[9, 2, 7], [0, 4, 8], [3, 1, 5]]
    assert [index for _, index in order] == [0, 4, 8, 3, 1, 5]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_sampler_divides_every_batch_among_the_ranks(world_size):
    whole = EpochSampler(50, 12, seed=0)
    shares = [EpochSampler(50, 12, 0, rank, world_size) for rank in range(world_size)]
    assert [len(share) for share in shares] == [48 // world_size] * world_size
    own = 12 // world_size
    for batch in range(4):
        together = [key for share in shares for key in list(share)[batch * own : (batch + 1) * own]]
        assert sorted(together) == sorted(list(whole)[batch * 12 : (batch + 1) * 12])
        assert [index for _, index in list(whole)[batch * 12 : (batch + 1) * 12]] == whole.images_of(0, batch)


def test_sampler_goes_on_within_an_epoch():
    whole = EpochSampler(50, 10, seed=0, epoch=1)
    rest = EpochSampler(50, 10, seed=0, epoch=1, batches=3)
    assert list(rest) == list(whole)[30:]
    assert len(rest) == 50
    rest.set_epoch(2)
    whole.set_epoch(2)
    assert list(rest) == list(whole)


class Recorder(pl.LightningModule):
    """Keeps the labels of every training batch, by epoch, and the number of images of the other stages."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)
        self.seen = {}
        self.images = {"val": 0, "test": 0}

    def training_step(self, batch, _):
        images, labels = batch
        self.seen.setdefault(self.current_epoch, []).append(labels.tolist())
        return torch.nn.functional.cross_entropy(self.head(images.flatten(1)), labels)

    def validation_step(self, batch, _):
        self.images["val"] += len(batch[0])

    def test_step(self, batch, batch_idx):
        self.images["test"] += len(batch[0])

    def predict_step(self, batch, _):
        return batch[2]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def plain_trainer():
    """`plain_trainer(**options)` is a Trainer on the CPU that writes nothing."""

    def build(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return pl.Trainer(accelerator="cpu", **{"enable_checkpointing": False} | quiet | options)

    with warnings.catch_warnings():  # Lightning's advice on numbers of workers, and on a folder that is not empty
        warnings.simplefilter("ignore")
        yield build


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_its_own_epochs(digits, tmp_path, num_workers, plain_trainer):
    config = dataclasses.replace(digits, num_workers=num_workers)

    def fit(folder, checkpoint=None):
        model = Recorder()
        saving = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = plain_trainer(max_epochs=3, limit_val_batches=0, enable_checkpointing=True, callbacks=saving)
        trainer.fit(model, datamodule=DataModule(config, 0), ckpt_path=checkpoint)
        return model.seen

    whole = fit(tmp_path)
    assert all(a != b for a, b in combinations(whole.values(), 2))
    resumed = fit(tmp_path / "resumed", tmp_path / "epoch=0.ckpt")
    assert resumed == {1: whole[1], 2: whole[2]}


def test_a_plain_trainer_runs_every_stage(digits, plain_trainer):
    model, data = Recorder(), DataModule(digits, 0)
    plain_trainer(max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=data)
    assert [len(batches) for batches in model.seen.values()] == [12]
    assert model.images == {"val": 143, "test": 0}
    trainer = plain_trainer()
    trainer.test(model, datamodule=data, verbose=False)
    assert model.images == {"val": 143, "test": 359}
    assert torch.cat(trainer.predict(model, datamodule=data)).tolist() == list(range(359))


def test_fast_dev_run(digits, plain_trainer):
    model = Recorder()
    plain_trainer(fast_dev_run=True).fit(model, datamodule=DataModule(digits, 0))
    assert [len(batches) for batches in model.seen.values()] == [1]
    assert model.images["val"] == 143


@pytest.mark.parametrize("augment", [AugmentConfig(crop_padding=1), AUGMENT])  # in batches and one image at a time
def test_overfit_batches_trains_on_the_same_batches_in_every_epoch(digits, plain_trainer, augment):
    config = dataclasses.replace(digits, augment=augment)
    model = Recorder()
    plain_trainer(max_epochs=2, overfit_batches=2).fit(model, datamodule=DataModule(config, 0))
    first = ready(config).train_set.labels[:200].tolist()
    assert model.seen == {epoch: [first[:100], first[100:]] for epoch in (0, 1)}


def test_open_splits_are_served_in_place_of_the_configured_ones(digits):
    splits = {"train": ready(digits).val_set, "val": ready(digits).test_set}
    module = ready(dataclasses.replace(digits, name="none", batch_size=10), splits=splits)
    assert len(module.train_dataloader()) == 14
    assert sum(len(labels) for _, labels, _ in module.val_dataloader()) == 359
    assert module.test_set is None
    with pytest.raises(RequestError, match=r"data=none: there is no test split in data\.root="):
        module.test_dataloader()


def test_photographs_are_served(photographs_root):
    config = DataConfig(
        name="imagefolder", root=str(photographs_root), img_size=64, crop_pct=0.875, batch_size=8, num_workers=0
    )
    module = ready(dataclasses.replace(config, augment=AUGMENT))
    assert (module.num_classes, module.test_set) == (2, None)
    images, labels = next(iter(module.train_dataloader()))
    assert (images.shape, labels.shape) == ((8, 3, 64, 64), (8,))
    assert len(module.val_dataloader()) == 1


@pytest.mark.parametrize(("wanted", "ranks", "workers"), [(0, 1, 0), (2, 1, 2), (8, 1, 4), (8, 2, 2), (8, 16, 1)])
def test_loader_workers_do_not_exceed_the_processors(monkeypatch, wanted, ranks, workers):
    monkeypatch.setattr("joblib.cpu_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert limit_workers(wanted) == workers
