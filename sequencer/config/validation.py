"""Checks of the values of a configuration that its types cannot express."""

import dataclasses
import importlib.util
from typing import Any

from sequencer.config.errors import RequestError
from sequencer.config.overrides import did_you_mean
from sequencer.config.schema import Config


def validate(config: Config) -> None:
    """Checks every bound and choice, values that depend on each other, and that the loggers are installed.

    Raises:
        RequestError: A value is illegal; the message names its key.
    """
    check_bounds(config)
    _check_optim(config)
    _check_images(config)
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
    choices, low, high = (knob[name] for name in ("choices", "low", "high"))
    if choices and item is not None and item not in choices:
        raise RequestError(f"{key}={item} is not possible: {did_you_mean(item, choices)}")
    if not isinstance(item, (int, float)) or isinstance(item, bool):
        return
    if not ((low is None or item >= low) and (high is None or item <= high)):  # NaN is in no range
        span = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise RequestError(f"{key}={item} is out of range: it must be {span}")


def _check_optim(config: Config) -> None:
    optim, trainer = config.optim, config.trainer
    if optim.ema_decay is None:
        for key in ("slot", "best_metric"):
            if "ema" in getattr(trainer, key):
                raise RequestError(f"trainer.{key}={getattr(trainer, key)} needs an average: set optim.ema_decay")
    if trainer.best_metric == "epoch" and trainer.early_stopping_patience is not None:
        raise RequestError("trainer.early_stopping_patience needs a trainer.best_metric other than epoch")
    if optim.warmup_epochs + optim.cooldown_epochs > trainer.max_epochs:
        raise RequestError(
            f"optim.warmup_epochs={optim.warmup_epochs} and cooldown_epochs={optim.cooldown_epochs} are part of "
            f"trainer.max_epochs={trainer.max_epochs} and do not fit into it"
        )


def _check_images(config: Config) -> None:
    data, model = config.data, config.model
    for key in ("mean", "std"):
        if len(getattr(data, key)) not in (1, data.in_chans):
            raise RequestError(f"data.{key} has {len(getattr(data, key))} entries for data.in_chans={data.in_chans}")
    for key in ("in_chans", "img_size"):
        if getattr(model, key) != getattr(data, key):
            raise RequestError(f"model.{key}={getattr(model, key)}, but data.{key}={getattr(data, key)}")
