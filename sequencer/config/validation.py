"""Checks of the values of a configuration that its types cannot express."""

import dataclasses
import importlib.util
import math
import os
import unicodedata
from typing import Any

from sequencer.config.errors import RequestError, did_you_mean, show
from sequencer.config.schema import LARGEST_INTEGER, Config
from sequencer.names import LOADING_ARGUMENTS

SMALLEST_ALPHA = 1e-6  # of mixup and CutMix; below it NumPy's beta distribution may return NaN


def validate(config: Config) -> None:
    """Checks every bound and choice, values that depend on each other, and that the loggers are installed.

    Raises:
        RequestError: A value is illegal; the message names its key.
    """
    check_bounds(config)
    _check_run_dir(config.run_dir)
    _check_optim(config)
    _check_trainer(config)
    _check_images(config)
    _check_model_arguments(config)
    if config.logger.wandb:
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # a folder named wandb, which offline runs create, has no origin
            raise RequestError("logger.wandb=true, but wandb is not installed: python -m pip install wandb")


def check_bounds(node: Any, prefix: str = "") -> None:
    """Checks the choices and bounds of every key of a section and its sub-sections.

    Args:
        node: The section, a dataclass of the schema.
        prefix: Of the keys in error messages.

    Raises:
        RequestError: A value is illegal; the message names its key.
    """
    for field in dataclasses.fields(node):
        key, value = prefix + field.name, getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
            continue
        for item in value if isinstance(value, list) else [value]:
            _check_item(key, item, field.metadata)


def _check_item(key: str, item: Any, knob: Any) -> None:
    if knob["choices"] and item is not None and item not in knob["choices"]:
        raise RequestError(f"{key}={show(item)} is not possible: {did_you_mean(item, knob['choices'])}")
    if isinstance(item, str):
        _check_text(key, item, knob["path"])
    elif isinstance(item, (int, float)) and not isinstance(item, bool):
        _check_number(key, item, knob)


def _check_number(key: str, item: int | float, knob: Any) -> None:
    low = -math.inf if knob["low"] is None else knob["low"]
    unbounded = LARGEST_INTEGER if isinstance(item, int) else math.inf
    high = unbounded if knob["high"] is None else knob["high"]
    if not low <= item <= high:  # NaN is in no range
        bounded = knob["high"] is not None or item > high
        span = f"between {low:g} and {high:.10g}" if bounded else f"at least {low:g}"
        raise RequestError(f"{key}={show(item)} is out of range: it must be {span}")
    if knob["finite"] and math.isinf(item):
        raise RequestError(f"{key}={item} is out of range: it must be finite")


def _check_text(key: str, text: str, path: bool) -> None:
    """Checks that a text can be written to files and logs, and that a path can name a file."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise RequestError(f"{key}={show(text)}: it has characters that cannot be printed")
    if not path or "://" in text:
        return
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise RequestError(f"{key}={show(text)}: there is no user {expanded.split('/')[0][1:]}")
    try:
        os.stat(expanded)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # whether it must exist is for its reader to check
    except OSError as error:
        raise RequestError(f"{key}={show(text)}: {error.strerror}") from error


def _check_run_dir(run_dir: str) -> None:
    if "://" in run_dir:
        raise RequestError(f"run_dir={show(run_dir)} is an address: a run is written to a folder")


def _check_optim(config: Config) -> None:
    optim, trainer = config.optim, config.trainer
    if optim.ema_decay is None:
        for key in ("slot", "best_metric"):
            if "ema" in getattr(trainer, key):
                raise RequestError(f"trainer.{key}={getattr(trainer, key)} needs an average: set optim.ema_decay")
    if trainer.best_metric == "epoch" and trainer.early_stopping_patience is not None:
        raise RequestError("trainer.early_stopping_patience needs a trainer.best_metric other than epoch")


def _check_trainer(config: Config) -> None:
    """Checks the lengths of a run and of its epochs, and that torchrun alone starts its processes."""
    trainer = config.trainer
    if trainer.max_steps == 0:
        raise RequestError("trainer.max_steps=0 trains nothing: it must be at least 1, or -1 for no limit")
    for split in ("train", "val", "test"):
        key = f"limit_{split}_batches"
        limit = getattr(trainer, key)
        if isinstance(limit, float) and limit > 1:
            raise RequestError(f"trainer.{key}={limit}: a number with a decimal point is a fraction, of at most 1.0")
    if trainer.strategy.endswith(("spawn", "fork", "notebook")):
        raise RequestError(
            f"trainer.strategy={trainer.strategy} starts processes of its own: leave it out, trainer.devices=N starts "
            "torchrun"
        )
    if trainer.limit_train_batches == 0:
        raise RequestError("trainer.limit_train_batches=0 trains nothing: it must be above 0, or null for all batches")


def _check_model_arguments(config: Config) -> None:
    """Checks that `model.kwargs` has only names that can be arguments of an architecture."""
    own = {field.name for field in dataclasses.fields(config.model)}
    for name in map(str, config.model.kwargs):
        if name in own:
            raise RequestError(f"model.kwargs.{name} has a key of its own: model.{name}")
        if name in LOADING_ARGUMENTS:
            raise RequestError(f"model.kwargs.{name} is no argument of an architecture; init_from=MODEL loads weights")


def _check_images(config: Config) -> None:
    data, model = config.data, config.model
    for key in ("mean", "std"):
        if len(getattr(data, key)) not in (1, data.in_chans):
            raise RequestError(f"data.{key} has {len(getattr(data, key))} entries for data.in_chans={data.in_chans}")
    for key in ("in_chans", "img_size"):
        if getattr(model, key) != getattr(data, key):
            raise RequestError(f"model.{key}={getattr(model, key)}, but data.{key}={getattr(data, key)}")
    for key in ("mixup", "cutmix"):
        if 0 < getattr(data.augment, key) < SMALLEST_ALPHA:
            raise RequestError(
                f"data.augment.{key}={getattr(data.augment, key)} is out of range: it must be 0 or at least "
                f"{SMALLEST_ALPHA:g}"
            )
    sizes = data.augment.sizes
    if sizes == []:
        raise RequestError("data.augment.sizes=[]: give one size or more, or null for data.img_size")
    if sizes and max(sizes) > data.img_size:
        raise RequestError(f"data.augment.sizes={sizes}: {max(sizes)} is more than data.img_size={data.img_size}")
    if data.augment.crop_padding > data.img_size:
        raise RequestError(
            f"data.augment.crop_padding={data.augment.crop_padding} is more than data.img_size={data.img_size}: crops "
            "could miss the image"
        )
