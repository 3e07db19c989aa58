"""The evaluation of a loaded model on a split of a data set."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sequencer import distributed
from sequencer.config import DataConfig, RequestError
from sequencer.data import Quarantine, eval_transform, has_test_split, open_split
from sequencer.evaluation.inputs import at_img_size, data_section, data_settings
from sequencer.evaluation.loop import FlipAveraged, evaluate
from sequencer.evaluation.metrics import ClassResult, Outcome
from sequencer.models import LoadedModel
from sequencer.printing import printable

log = logging.getLogger("sequencer")


@dataclass(frozen=True)
class Evaluation:
    """The results of a model on a split; the same on every rank except for the times."""

    arch: str
    slot: str  # raw or ema
    data: DataConfig  # the settings in use, preprocessing included
    split: str
    flip: bool  # whether each image was averaged with its mirror image
    metrics: dict[str, float]  # see `evaluate_model`
    per_class: list[ClassResult]  # in the order of the logits
    outcomes: list[Outcome]  # of every readable image, ordered by index
    ids: list[str]  # of every image, by index
    class_names: list[str]
    unbalanced: bool  # whether the largest class has twice as many images as the smallest one

    def record(self) -> dict[str, Any]:
        """The settings and the metrics as one flat dictionary."""
        return describe_setting(self.arch, self.slot, self.data, self.split, self.flip) | self.metrics


def describe_setting(arch: str, slot: str, data: DataConfig, split: str, flip: bool) -> dict[str, Any]:
    """Returns what the result of an evaluation depends on besides the weights."""
    setting: dict[str, Any] = {"arch": arch, "slot": slot, "data": data.name, "data_root": data.root, "split": split}
    return setting | {"img_size": data.img_size, "crop_pct": data.crop_pct, "flip": flip}


def evaluation_data(loaded: LoadedModel, name: str | None = None, **changes: Any) -> DataConfig:
    """The data section that a model is evaluated with.

    Args:
        loaded: The model.
        name: A data set; by default the one that the model was trained on. Another set is used with its own settings
            and the model's preprocessing.
        changes: Keys of `DataConfig` with values in place of those found; None leaves a key as it is.

    Raises:
        RequestError: No name is given and the model's data set is not known; or the file of the model names data at a
            remote address, which `root` does not repeat.
    """
    section = data_section(loaded)
    if section is None or name not in (None, section.name):
        if name is None:
            raise RequestError(f"the data set that {loaded.arch} was trained on is not known: name one (--data NAME)")
        from sequencer.config import compose  # Hydra takes a moment to import

        section = replace(compose([f"data={name}"]).data, **data_settings(loaded.pretrained_cfg))
    elif "://" in section.root and changes.get("root") is None:  # the file may be that of somebody else
        raise RequestError(
            f"{loaded.arch} was trained on data at {printable(section.root)}\nto connect to it, add --data-root ADDRESS"
        )
    return replace(section, **{key: value for key, value in changes.items() if value is not None})


def evaluate_model(
    loaded: LoadedModel,
    data: DataConfig,
    split: Literal["val", "test"] | None = None,
    device: torch.device | str = "cpu",
    flip: bool = False,
    bad_samples: Path | None = None,
) -> Evaluation:
    """Evaluates a model on a split; in a distributed job every rank must call it.

    The metrics are those of `ClassificationMetrics`, with the bounds of the 95% confidence intervals of `top1` and
    `top5` by Wilson's score (`top1_low`, `top1_high`, ...), `total` (images evaluated), `unreadable` (images left out),
    `time/evaluation_s` (seconds) and `time/images_per_s`, loading included.

    Args:
        loaded: The model, which is moved to `device` and left in eval mode.
        data: As `evaluation_data` returns it.
        split: `val` or `test`; by default `test` if the data set has one, otherwise `val`. Only this split is opened.
        device: Where the model runs.
        flip: Average the probabilities of each image and its mirror image.
        bad_samples: A CSV file for the images that cannot be read; an older one is replaced. Without it an image that
            cannot be read is left out, however many there are.

    Raises:
        RequestError: The split is missing, its number of classes is not the model's, or the model does not take images
            of this size. Nothing has been written.
        TooManyBadImages: More images cannot be read than `data.max_bad_share` allows.
    """
    chosen: Literal["val", "test"] = split or ("test" if has_test_split(data) else "val")
    images = distributed.one_by_one(lambda: open_split(data, chosen, eval_transform(data)))
    check_classes(loaded, images.class_names)
    if data.img_size != loaded.pretrained_cfg["input_size"][-1]:
        loaded = at_img_size(loaded, data.img_size)
    if bad_samples is not None:
        distributed.one_by_one(partial(_remove, bad_samples))
        images.quarantine = Quarantine(bad_samples, chosen, len(images), data.max_bad_share)
    loader = images.evaluation_loader(data, distributed.rank(), distributed.world_size())
    network = (FlipAveraged(loaded.model) if flip else loaded.model).to(device)
    found: list[Outcome] = []
    start = time.perf_counter()
    metrics = evaluate(network, loader, len(images.class_names), device, found)
    seconds = time.perf_counter() - start
    values = _values(metrics.compute(), len(images), seconds)
    per_class = metrics.per_class(images.class_names)
    return Evaluation(
        loaded.arch,
        loaded.slot,
        data,
        chosen,
        flip,
        values,
        per_class,
        found,
        images.ids,
        images.class_names,
        metrics.unbalanced,
    )


def _remove(path: Path) -> None:
    """Removes a file, on rank 0 only: other ranks may already have written a new one."""
    if distributed.is_first():
        path.unlink(missing_ok=True)


def check_classes(loaded: LoadedModel, names: Sequence[str]) -> None:
    """Checks that a model has as many classes as a data set; classes of other names are logged as a warning.

    Raises:
        RequestError: It has not.
    """
    if loaded.model.num_classes != len(names):
        raise RequestError(f"the model has {loaded.model.num_classes} classes, the data set {len(names)}")
    renamed = [pair for pair in zip(loaded.class_names or names, names, strict=True) if pair[0] != pair[1]]
    if renamed and distributed.is_first():
        log.warning(
            "%d of %d classes are named differently in the model and in the data set, e.g. %s and %s; they are matched"
            " by position",
            len(renamed),
            len(names),
            *map(printable, renamed[0]),
        )


def _values(metrics: dict[str, Tensor], images: int, seconds: float) -> dict[str, float]:
    values = {name: value.item() for name, value in metrics.items()}
    total = int(values["total"])
    for name in [name for name in ("top1", "top5") if name in values]:
        values[f"{name}_low"], values[f"{name}_high"] = _wilson_interval(round(values[name] * total), total)
    values["unreadable"] = images - total
    return values | {"time/evaluation_s": seconds, "time/images_per_s": total / seconds}


def _wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """The 95% confidence interval of a fraction by Wilson's score (1927); NaN if `total` is 0."""
    from scipy.stats import binomtest  # imported here because the import takes half a second

    if not total:
        return math.nan, math.nan
    interval = binomtest(hits, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
