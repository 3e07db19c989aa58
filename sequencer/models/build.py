"""Building of models from timm's registry, and of models that a file describes."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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

from sequencer.models.arguments import check_model_args, describe_unknown
from sequencer.models.checkpoint import CheckpointError
from sequencer.printing import first_line
from sequencer.variants import VARIANTS

# what a model may have besides what its file holds, such as buffers that are not stored
SPARE_VALUES = 2**26
SPARE_TENSORS = 1000


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
        reason = describe_unknown(name, error) or first_line(error)
        raise _Unbuildable(f"{name} cannot be built: {reason}") from error


class _Unbuildable(CheckpointError):
    """The constructor of a model has failed, as some do on the meta device."""


def build_within(path: Path, stored: int, name: str, **arguments: Any) -> nn.Module:
    """Builds a model that a file describes, which must not be larger than the file.

    The model is first built on the meta device, which takes no memory.

    Args:
        path: The file with the weights.
        stored: Number of tensors in the file.
        name: Registered name.
        **arguments: Arguments of `create_model`.

    Raises:
        CheckpointError: The model is larger, or cannot be built.
    """
    values = path.stat().st_size + SPARE_VALUES  # a value takes at least a byte
    tensors = 2 * stored + SPARE_TENSORS
    try:
        with _limited(values, tensors), suppress(_Unbuildable), torch.device("meta"):
            create_model(name, **arguments)
        with _limited(values, tensors):
            return create_model(name, **arguments)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


class _Larger(CheckpointError):
    """A model is larger than the file with its weights."""


@contextmanager
def _limited(values: int, tensors: int) -> Iterator[None]:
    """Limits the parameters and buffers of the modules that are built in its context.

    Args:
        values: Largest number of values in all of them.
        tensors: Largest number of parameters and buffers.

    Raises:
        _Larger: A limit is exceeded.
    """

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal values, tensors
        if tensor is not None:
            values, tensors = values - tensor.numel(), tensors - 1
        if min(values, tensors) < 0:
            raise _Larger("its description is that of a model far larger than the file")

    hooks = (register_module_parameter_registration_hook, register_module_buffer_registration_hook)
    handles = [register(count) for register in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
