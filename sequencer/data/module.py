"""The one DataModule: opens the parts of a set and serves them in batches."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data.memory import CPU, Held, MemoryEvalSet, MemorySet, can_augment, fits, is_held
from sequencer.data.quarantine import Quarantine
from sequencer.data.readable import ReadableSet, collate_readable
from sequencer.data.seeding import EpochSampler, SeededSet
from sequencer.data.sets import ImageSet, has_test_part, open_dataset
from sequencer.data.shards import ShardSet, StreamSampler, StreamSet, Stretches
from sequencer.data.transforms import eval_transform, train_transform
from sequencer.lightning_internals import training_progress


class DataModule(pl.LightningDataModule):
    """Batches `(images, labels)`: float32 `B C H W`, normalised, and int64 `B`; in evaluation with the images' indices.

    After `setup`: `train_set`, `val_set`, `test_set` (None for an image folder without `test/`) and `class_names`.
    """

    train_set: ImageSet | ShardSet
    val_set: ImageSet | ShardSet
    test_set: ImageSet | ShardSet | None
    class_names: list[str]

    def __init__(self, config: DataConfig, seed: int, bad_samples: Path | None = None) -> None:
        """`bad_samples` is the file that unreadable images are listed in."""
        super().__init__()
        self.config = config
        self.seed = seed
        self._is_set_up = False
        self._bad_samples = bad_samples
        self._position: dict[str, Any] = {"epoch": 0, "batches": 0, "reshuffles": []}
        self._reshuffles = 0

    @classmethod
    def of_parts(cls, config: DataConfig, seed: int, train: ImageSet, val: ImageSet) -> "DataModule":
        """Serves parts that are open; there is no test part."""
        module = cls(config, seed)
        module.train_set, module.val_set, module.test_set = train, val, None
        module.class_names, module._is_set_up = train.class_names, True
        return module

    def state_dict(self) -> dict[str, Any]:
        """Part of every checkpoint: the epoch, how many of its batches have been trained on, and their order."""
        assert self.trainer is not None
        epoch, batches = training_progress(self.trainer)
        same = epoch == self._position["epoch"]
        return {"epoch": epoch, "batches": batches, "reshuffles": self._position["reshuffles"] if same else []}

    def reshuffle(self, times: int) -> None:
        """To be called before training starts: draws the rest of the epoch that it starts in anew, so many times."""
        self._reshuffles = times
        self.load_state_dict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning starts the first epoch's workers before it calls set_epoch: a resumed run would repeat epoch 0
        reshuffles = state_dict["reshuffles"] + [state_dict["batches"]] * self._reshuffles
        self._position = state_dict | {"reshuffles": reshuffles}

    def images_of(self, epoch: int, batch: int) -> list[int]:
        """Indices in `train_set` of the images of a batch, over all processes."""
        sampler, images = self._sampler(), self.train_set
        if not isinstance(images, ShardSet):
            return sampler.batches_of(epoch)[batch].tolist()
        world_size = self._share()[1]
        share = sampler.batch_size // world_size
        every = [self._stretches(images, sampler, rank) for rank in range(world_size)]
        return [one.number(epoch, index) for one in every for index in range(batch * share, (batch + 1) * share)]

    def setup(self, stage: str | None = None) -> None:
        """Open every part, once, whatever the stage.

        Raises:
            RequestError: a part is missing or incomplete, or the configuration does not fit the images.
        """
        if self._is_set_up:
            return
        for_eval = eval_transform(self.config)
        self.train_set = open_dataset(self.config, "train", train_transform(self.config))
        self.val_set = open_dataset(self.config, "val", for_eval)
        self.test_set = open_dataset(self.config, "test", for_eval) if has_test_part(self.config) else None
        self.class_names = self.train_set.class_names
        for part, images in self.parts.items():
            if self._bad_samples is not None:
                images.quarantine = Quarantine(self._bad_samples, part, len(images), self.config.max_bad_share)
        self._is_set_up = True

    @property
    def parts(self) -> dict[str, ImageSet | ShardSet]:
        """The parts by their names, those that there are."""
        parts = {"train": self.train_set, "val": self.val_set, "test": self.test_set}
        return {name: images for name, images in parts.items() if images is not None}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and augmented from (seed, epoch); leaves out an incomplete last batch unless it is the only one."""
        share, sampler, images = self.config.batch_size // self._share()[1], self._sampler(), self.train_set
        if isinstance(images, ShardSet):
            return make_loader(StreamSet(self._stretches(images, sampler), self.seed), share, sampler, self.config)
        if is_held(images, self.config) and can_augment(self.config):
            held = Held(images, self.config, self._device(images))
            return make_loader(MemorySet(held, self.config, self.seed), share, sampler, self.config, held)
        return make_loader(SeededSet(images, self.seed), share, sampler, self.config)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every readable validation image once, in order; with several processes, this one's share."""
        return evaluation_loader(self.val_set, self.config, *self._share(), self._device(self.val_set))

    def test_dataloader(self) -> DataLoader[Any]:
        """Every readable test image once, in order; with several processes, this one's share.

        Raises:
            RequestError: the set has no test part.
        """
        if self.test_set is None:
            raise RequestError(f"data={self.config.name}: there is no test part in data.root={self.config.root}")
        return evaluation_loader(self.test_set, self.config, *self._share(), self._device(self.test_set))

    def _sampler(self) -> EpochSampler:
        sampler = StreamSampler if isinstance(self.train_set, ShardSet) else EpochSampler
        return sampler(
            len(self.train_set),
            self.config.batch_size,
            self.seed,
            *self._share(),
            self._position["epoch"],
            self._position["batches"],
            self._position["reshuffles"],
        )

    def _stretches(self, images: ShardSet, sampler: EpochSampler, rank: int | None = None) -> Stretches:
        own, world_size = self._share()
        return Stretches(
            images,
            sampler.batches * sampler.batch_size,
            sampler.batch_size // world_size,
            self.config.num_workers,
            own if rank is None else rank,
            world_size,
            self.seed,
            self.config.shuffle_buffer,
            (sampler.first_epoch, " ".join(map(str, sampler.reshuffles))),
        )

    def _share(self) -> tuple[int, int]:
        """This process's rank, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _device(self, images: ImageSet | ShardSet) -> torch.device:
        """Where images that are held are kept: on the device that trains, if it has room."""
        device = self.trainer.strategy.root_device if self.trainer else CPU
        return device if is_held(images, self.config) and fits(images, device) else CPU


def evaluation_loader(
    images: ImageSet | ShardSet,
    config: DataConfig,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
) -> DataLoader[Any]:
    """Batches of images, labels and indices: every readable image once, over all processes.

    The shares are not padded: none is longer by more than one image, and no image is in two. `device` is where images
    that are held are kept.
    """
    batch_size = config.eval_batch_size
    if isinstance(images, ShardSet):
        stretches = Stretches(images, len(images), batch_size, config.num_workers, rank, world_size, buffer=batch_size)
        keys = [(0, index) for index in range(len(stretches))]
        return make_loader(StreamSet(stretches), batch_size, keys, config, collate_fn=collate_readable)
    share = range(rank, len(images), world_size)
    if is_held(images, config) and config.crop_pct == 1:
        held = Held(images, config, device)
        return make_loader(MemoryEvalSet(held), batch_size, share, config, held)
    return make_loader(ReadableSet(images), batch_size, share, config, collate_fn=collate_readable)


def make_loader(
    dataset: Any, batch_size: int, sampler: Any, config: DataConfig, held: Held | None = None, collate_fn: Any = None
) -> DataLoader[Any]:
    """`held` images make whole batches; those on a GPU are not sent to other processes."""
    on_gpu = held is not None and held.data.device != CPU
    workers = 0 if on_gpu else config.num_workers
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() and not on_gpu,
        collate_fn=list if held is not None else collate_fn,
        # a generator of its own: by default every new iterator draws from torch's global state
        generator=torch.Generator(),
    )
