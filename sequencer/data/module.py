"""The LightningDataModule that opens the splits of a data set and serves them in batches."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.progress import track
from torch.utils.data import DataLoader

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data.quarantine import Quarantine
from sequencer.data.seeding import START, Position
from sequencer.data.sets import has_test_split, open_split
from sequencer.data.split import CPU, Split, SplitName
from sequencer.data.transforms import eval_transform, train_transform
from sequencer.lightning_internals import training_progress
from sequencer.printing import printable


class DataModule(pl.LightningDataModule):
    """Serves the splits of a data set in batches of normalised images.

    Training batches `(images, labels)`, float32 `B C H W` and int64 `B`, are shuffled and augmented as functions of
    (seed, epoch). Evaluation batches `(images, labels, indices)` hold every readable image once, in order. With several
    ranks each serves its share of every training batch and of the evaluation images; a plain `Trainer` of several
    devices then needs `use_distributed_sampler=False`.

    Args:
        config: the `data` section.
        seed: seed of order and augmentation.
        rank, world_size: this process, and how many there are.
        device: device that trains; small sets are kept there if it has room.
        bad_samples: CSV file that unreadable images are listed in; None lists none and allows any number.
        splits: open splits, with their transforms, to serve in place of those that `config` names.

    Attributes:
        splits: the open splits by name, after `setup`; `test` is missing where the set has none.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
        bad_samples: Path | None = None,
        splits: Mapping[SplitName, Split] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.rank, self.world_size, self.device = rank, world_size, device
        self.splits: dict[SplitName, Split] = dict(splits or {})
        self._bad_samples = bad_samples
        self._position = START
        self._reshuffles = 0

    def state_dict(self) -> dict[str, Any]:
        """State that is part of every checkpoint.

        Returns:
            The epoch, how many of its batches have been trained on, its reshuffles, and the fingerprints of the splits.
        """
        assert self.trainer is not None
        epoch, batches = training_progress(self.trainer)
        same = epoch == self._position["epoch"]
        return {
            "epoch": epoch,
            "batches": batches,
            "reshuffles": self._position["reshuffles"] if same else [],
            "fingerprints": self.fingerprints,
        }

    def reshuffle(self, times: int) -> None:
        """Reorders the unseen rest of the resumed epoch `times` times; call before training."""
        self._reshuffles = times
        self.load_state_dict(dict(self._position))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning starts the first epoch's workers before it calls set_epoch: a resumed run would repeat epoch 0
        reshuffles = state_dict["reshuffles"] + [state_dict["batches"]] * self._reshuffles
        self._position = Position(epoch=state_dict["epoch"], batches=state_dict["batches"], reshuffles=reshuffles)

    def images_of(self, epoch: int, batch: int) -> list[int]:
        """Indices in the training split of the images of a batch, over all ranks."""
        sampler = self.train_set.sampler(self.config, self.seed, self.rank, self.world_size, self._position)
        return sampler.images_of(epoch, batch)

    def setup(self, stage: str | None = None) -> None:
        """Opens every split, once, for all stages.

        Raises:
            RequestError: a split is missing or incomplete, or the configuration does not fit the images.
        """
        if self.splits:
            return
        for_eval = eval_transform(self.config)
        splits: dict[SplitName, Split] = {
            "train": open_split(self.config, "train", train_transform(self.config)),
            "val": open_split(self.config, "val", for_eval),
        }
        if has_test_split(self.config):
            splits["test"] = open_split(self.config, "test", for_eval)
        for split in splits.values():
            if split.class_names != splits["train"].class_names:
                raise RequestError(
                    f"{printable(split.location)} has other classes, or the same in another order, than "
                    f"{printable(splits['train'].location)}"
                )
        if self._bad_samples is not None:
            for name, split in splits.items():
                split.quarantine = Quarantine(self._bad_samples, name, len(split), self.config.max_bad_share)
        self.splits = splits

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the splits by name; call `setup` first."""
        return {name: split.fingerprint for name, split in self.splits.items()}

    @property
    def train_set(self) -> Split:
        return self.splits["train"]

    @property
    def val_set(self) -> Split:
        return self.splits["val"]

    @property
    def test_set(self) -> Split | None:
        return self.splits.get("test")

    @property
    def class_names(self) -> list[str]:
        return self.train_set.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def count_readable(self, show_progress: bool = False) -> int:
        """Decodes every image of every split and returns how many can be read.

        Raises:
            TooManyBadImages: more images of a split are unreadable than `data.max_bad_share` allows.
        """
        return sum(
            sum(
                track(
                    split.readable_counts(self.config.num_workers),
                    f"checking {name} images",
                    transient=True,
                    disable=not show_progress,
                )
            )
            for name, split in self.splits.items()
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the training batches; an incomplete last batch is dropped unless it is the only one."""
        return self.train_set.training_loader(
            self.config, self.seed, self.rank, self.world_size, self._position, self.device
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the validation images."""
        return self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the test images.

        Raises:
            RequestError: the set has no test split.
        """
        if self.test_set is None:
            raise RequestError(f"data={self.config.name}: there is no test split in data.root={self.config.root}")
        return self._evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the test images, or of the validation images where the set has no test split."""
        return self._evaluation_loader(self.splits.get("test", self.val_set))

    def _evaluation_loader(self, split: Split) -> DataLoader[Any]:
        return split.evaluation_loader(self.config, self.rank, self.world_size, self.device)
