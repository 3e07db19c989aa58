"""Building of models from timm's registry, and of models that a file describes."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_name
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from sequencer.models.arguments import check_model_args
from sequencer.models.checkpoint import CheckpointError, first_line
from sequencer.variants import VARIANTS

SPARE_VALUES = 2**26  # that a model may hold besides those in its file, e.g. in buffers that are not stored


def create_model(
    name: str, img_size: int | Sequence[int] | None = None, pretrained: bool = False, **model_args: Any
) -> nn.Module:
    """Builds a model by `timm.create_model`.

    Args:
        name: Registered name.
        img_size: Height and width of the images in pixels. It is passed to models that are built for one size and
            ignored by others.
        pretrained: Whether to load the weights that timm publishes.
        **model_args: Arguments of the architecture; see `sequencer.models.arguments.check_model_args`.

    Raises:
        CheckpointError: There is no model of this name, it does not accept the arguments, or its published weights
            cannot be downloaded.
    """
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(nearest)}?" if nearest else ""
        raise CheckpointError(f"unknown model {name}{hint}")
    try:
        check_model_args(name, model_args)
        config = timm.get_pretrained_cfg(name)
        if img_size is not None and (get_arch_name(name) in VARIANTS or (config and config.fixed_input_size)):
            model_args["img_size"] = img_size
        return timm.create_model(name, pretrained=pretrained, **model_args)
    except CheckpointError:
        raise
    except Exception as error:  # timm's models and the hub client raise errors of many types
        raise CheckpointError(f"{name} cannot be built: {first_line(error)}") from error


def build_within(weights: Path, name: str, **arguments: Any) -> nn.Module:
    """Builds a model that a file describes, which must not be larger than the file with its weights.

    The model is first built on the meta device, which takes no memory.

    Args:
        weights: The file with the weights.
        name: Registered name.
        **arguments: Arguments of `create_model`.

    Raises:
        CheckpointError: The model is larger, or cannot be built.
    """
    most = weights.stat().st_size + SPARE_VALUES  # a value takes at least a byte
    with _limited(most, weights):
        try:
            with torch.device("meta"):
                create_model(name, **arguments)
        except _TooManyValues:
            raise
        except CheckpointError:  # there are modules that cannot be built on the meta device
            pass
    with _limited(most, weights):
        return create_model(name, **arguments)


class _TooManyValues(CheckpointError):
    """A model has more values than the file with its weights can hold."""


@contextmanager
def _limited(most: int, weights: Path) -> Iterator[None]:
    """Limits the number of values in the parameters and buffers of the modules that are built meanwhile.

    Raises:
        _TooManyValues: A parameter or buffer exceeds the limit.
    """
    total = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal total
        total += 0 if tensor is None else tensor.numel()
        if total > most:
            raise _TooManyValues(f"{weights} is described as a model of far more weights than the file holds")

    handles = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
