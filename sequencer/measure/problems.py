"""Problems of a run that can be found before it starts."""

import shutil
from pathlib import Path

import timm

from sequencer.config.schema import Config
from sequencer.data import DataModule, Split, TooManyBadImages
from sequencer.files import nearest_existing
from sequencer.printing import printable

MOST_IMAGES = 500  # per split that are read


def find_data_problems(data: DataModule, config: Config) -> list[str]:
    """Describes classes without images, images that cannot be read, and a batch larger than the training split.

    Reads at most `MOST_IMAGES` images of each split, and none that are in memory or in shards.
    """
    found = []
    for name, split in data.splits.items():
        if split.labels is not None and (missing := set(range(data.num_classes)) - set(split.labels.tolist())):
            named = ", ".join(printable(data.class_names[label]) for label in sorted(missing)[:5])
            found.append(f"{name}: no image of {len(missing)} classes: {named}{', ...' if len(missing) > 5 else ''}")
        found += [f"{name}: {problem}" for problem in _find_bad_images(split)]
    if config.data.batch_size > len(data.train_set):
        found.append(f"train: data.batch_size={config.data.batch_size} is more than its {len(data.train_set)} images")
    return found


def _find_bad_images(split: Split) -> list[str]:
    try:
        decoded, bad = split.probe(MOST_IMAGES)
    except TooManyBadImages as error:
        return [str(error)]
    return [f"{len(bad)} of {decoded} images examined cannot be read, e.g. {printable(bad[0])}"] if bad else []


def find_weights_problems(config: Config) -> list[str]:
    """Describes the problem if published weights are asked for and there are none; downloads nothing."""
    if not config.model.pretrained or timm.is_model_pretrained(config.model.name):
        return []
    return [f"model.pretrained=true: there are no published weights of {config.model.name}"]


def find_memory_problems(needed: int, available: int) -> list[str]:
    """Describes the problem if training is estimated to need more memory than is available, in bytes."""
    if needed <= available:
        return []
    return [
        f"memory: about {needed / 2**30:.1f} GiB are needed on each device, {available / 2**30:.1f} GiB are available: "
        "lower data.batch_size, raise trainer.accumulate_grad_batches, or set model.grad_checkpointing=true"
    ]


def find_disk_problems(run_dir: Path, needed: int) -> list[str]:
    """Describes the problem if fewer than `needed` bytes are free on the disk of `run_dir`."""
    folder = nearest_existing(run_dir)
    free = shutil.disk_usage(folder).free
    return [f"disk: {free / 2**20:.0f} MiB are free in {folder}"] if free < needed else []
