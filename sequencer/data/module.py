"""The one DataModule: opens the parts of a set and serves them in batches."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from conf.errors import RequestError
from conf.schema import DataConfig
from sequencer.data.memory import CPU, Held, MemoryEvalSet, MemorySet, can_augment, fits, is_held
from sequencer.data.quarantine import Quarantine
from sequencer.data.readable import ReadableSet, collate_readable
from sequencer.data.seeding import EpochSampler, SeededSet
from sequencer.data.sets import ImageSet, has_test_part, open_dataset
from sequencer.data.transforms import eval_transform, train_transform


class DataModule(pl.LightningDataModule):
    """Batches `(images, labels)`: float32 `B C H W`, normalised, and int64 `B`; in evaluation with the images' indices.

    After `setup`: `train_set`, `val_set`, `test_set` (None for an image folder without `test/`) and `class_names`.
    """

    train_set: ImageSet
    val_set: ImageSet
    test_set: ImageSet | None
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
        loop: Any = self.trainer.fit_loop
        epoch = loop.epoch_progress.current
        ended = epoch.processed == epoch.started  # the batches counted are those of the epoch before
        same = epoch.processed == self._position["epoch"]
        return {
            "epoch": epoch.processed,
            "batches": 0 if ended else loop.epoch_loop.batch_progress.current.ready,
            "reshuffles": self._position["reshuffles"] if same else [],
        }

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
        return self._sampler().batches_of(epoch)[batch].tolist()

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
    def parts(self) -> dict[str, ImageSet]:
        """The parts by their names, those that there are."""
        parts = {"train": self.train_set, "val": self.val_set, "test": self.test_set}
        return {name: images for name, images in parts.items() if images is not None}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and augmented from (seed, epoch); leaves out an incomplete last batch unless it is the only one."""
        share = self.config.batch_size // self._share()[1]
        if is_held(self.train_set, self.config) and can_augment(self.config):
            held = self._hold(self.train_set)
            return self._held_loader(MemorySet(held, self.config, self.seed), share, self._sampler(), held)
        return self._loader(SeededSet(self.train_set, self.seed), share, self._sampler())

    def val_dataloader(self) -> DataLoader[Any]:
        """Every readable validation image once, in order; with several processes, this one's share."""
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every readable test image once, in order; with several processes, this one's share.

        Raises:
            RequestError: the set has no test part.
        """
        if self.test_set is None:
            raise RequestError(f"data={self.config.name}: there is no folder test/ in data.root={self.config.root}")
        return self._eval_loader(self.test_set)

    def _eval_loader(self, images: ImageSet) -> DataLoader[Any]:
        shard = self._shard(images)
        if is_held(images, self.config) and self.config.crop_pct == 1:
            held = self._hold(images)
            return self._held_loader(MemoryEvalSet(held), self.config.eval_batch_size, shard, held)
        return self._loader(ReadableSet(images), self.config.eval_batch_size, shard, collate_fn=collate_readable)

    def _sampler(self) -> EpochSampler:
        return EpochSampler(
            len(self.train_set),
            self.config.batch_size,
            self.seed,
            *self._share(),
            self._position["epoch"],
            self._position["batches"],
            self._position["reshuffles"],
        )

    def _share(self) -> tuple[int, int]:
        """This process's rank, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _shard(self, dataset: ImageSet) -> range:
        """Shares without padding: none is longer by more than one image, and no image is in two."""
        rank, world_size = self._share()
        return range(rank, len(dataset), world_size)

    def _hold(self, images: ImageSet) -> Held:
        """On the device that trains, if it has room."""
        device = self.trainer.strategy.root_device if self.trainer else CPU
        return Held(images, self.config, device if fits(images, device) else CPU)

    def _held_loader(self, dataset: Any, batch_size: int, sampler: Any, held: Held) -> DataLoader[Any]:
        """What is on a GPU is not sent to other processes."""
        on_cpu = held.data.device == CPU
        workers = self.config.num_workers if on_cpu else 0
        return self._loader(dataset, batch_size, sampler, workers, on_cpu, collate_fn=list)

    def _loader(
        self,
        dataset: Any,
        batch_size: int,
        sampler: Any,
        workers: int | None = None,
        pin_memory: bool = True,
        **kwargs: Any,
    ) -> DataLoader[Any]:
        workers = self.config.num_workers if workers is None else workers
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory and torch.cuda.is_available(),
            # a generator of its own: by default every new iterator draws from torch's global state
            generator=torch.Generator(),
            **kwargs,
        )
