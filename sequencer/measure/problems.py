"""Problems of a run that can be found before it starts."""

import math
import shutil
from pathlib import Path
from typing import Any

from sequencer.config.schema import Config
from sequencer.data import FILE_SETS, DataModule, ShardSet, TooManyBadImages, UnreadableImage

MOST_IMAGES = 500  # per split that are read


def find_data_problems(data: DataModule, config: Config) -> list[str]:
    """Describes classes without images, images that cannot be read, and a batch larger than the training split.

    Reads at most `MOST_IMAGES` images of each split, and only of sets that are image files. Shards are not searched.
    """
    found = []
    for name, images in data.parts.items():
        if isinstance(images, ShardSet):
            continue
        missing = set(range(data.num_classes)) - set(images.labels.tolist())
        if missing:
            named = ", ".join(data.class_names[label] for label in sorted(missing)[:5])
            found.append(f"{name}: no image of {len(missing)} classes: {named}{', ...' if len(missing) > 5 else ''}")
        if config.data.name in FILE_SETS:
            found += [f"{name}: {problem}" for problem in _find_bad_images(images)]
    if config.data.batch_size > len(data.train_set):
        found.append(f"train: data.batch_size={config.data.batch_size} is more than its {len(data.train_set)} images")
    return found


def _find_bad_images(images: Any) -> list[str]:
    indices = range(0, len(images), math.ceil(len(images) / MOST_IMAGES))
    bad, problems = [], []
    for index in indices:
        try:
            images.decode(index)
        except UnreadableImage as error:
            bad.append(error.path)
        except TooManyBadImages as error:
            problems.append(str(error))
            break
    if bad:
        problems.append(f"{len(bad)} of {len(indices)} images examined cannot be read, e.g. {bad[0]}")
    return problems


def find_disk_problems(run_dir: Path, needed: int) -> list[str]:
    """Says so if fewer than `needed` bytes are free where `run_dir` is to be."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return [f"disk: {free / 2**20:.0f} MiB are free in {folder}"] if free < needed else []
