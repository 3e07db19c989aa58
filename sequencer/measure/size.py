"""The size of a training step: parameters, operations and memory, found without computing or allocating anything."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sequencer.config.errors import RequestError
from sequencer.config.schema import Config
from sequencer.models import CheckpointError, create_model

STATES = 4  # of a parameter: its value, its gradient, and two moments of an optimizer such as AdamW


@dataclass(frozen=True)
class Size:
    """Size of a model and of its training step on one image.

    Attributes:
        parameters: Number of parameters.
        flops: Operations of forward and backward pass; a multiplication with an addition counts as two. 0 if they could
            not be counted in time.
        activations: Bytes that the forward pass keeps for the backward pass, in float32; likewise.
    """

    parameters: int
    flops: int = 0
    activations: int = 0

    def checkpoint(self, config: Config) -> int:
        """Estimates the bytes of a checkpoint, which holds everything but the gradients."""
        return 4 * (STATES - 1 + (config.optim.ema_decay is not None)) * self.parameters

    def memory(self, config: Config, images: int) -> int:
        """Estimates the bytes that training takes on one device, loaded batches included.

        Args:
            config: The run.
            images: Images per batch on the device.
        """
        states = STATES + (config.optim.ema_decay is not None)
        image = 4 * config.data.in_chans * config.data.img_size**2
        loaded = images * image * (2 * config.data.num_workers + 1)  # each worker prefetches two batches
        return 4 * states * self.parameters + images * self.activations + loaded


def estimate_size(config: Config, num_classes: int, img_size: int) -> Size:
    """Runs the model of a run forward and backward on tensors without storage.

    Args:
        config: The run.
        num_classes: Number of classes.
        img_size: Height and width of the images, in pixels.

    Raises:
        RequestError: The model cannot be built.
    """
    model = _build_without_memory(config, num_classes, img_size)
    if config.model.grad_checkpointing:
        model.set_grad_checkpointing()  # type: ignore[operator]
    with FakeTensorMode(allow_non_fake_inputs=True):
        return measure_size(model.to_empty(device="cpu"), config.data.in_chans, img_size)


def count_parameters(config: Config, num_classes: int) -> int:
    """Counts the parameters of the model of a run, of which nothing is computed.

    Raises:
        RequestError: The model cannot be built.
    """
    model = _build_without_memory(config, num_classes, config.model.img_size)
    return sum(parameter.numel() for parameter in model.parameters())


def _build_without_memory(config: Config, num_classes: int, img_size: int) -> nn.Module:
    section = config.model
    try:
        with torch.device("meta"):
            return create_model(
                section.name,
                img_size=img_size,
                in_chans=section.in_chans,
                num_classes=num_classes,
                **section.kwargs,
            )
    except CheckpointError as error:
        raise RequestError(str(error)) from error


def measure_size(model: nn.Module, in_chans: int, img_size: int) -> Size:
    """Runs a model on the CPU forward and backward on two images.

    Args:
        model: A model, which is left without gradients.
        in_chans: Channels of the images.
        img_size: Height and width of the images, in pixels.
    """
    kept: dict[int, Tensor] = {}  # by storage

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    images = torch.ones(2, in_chans, img_size, img_size)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, _same):
            loss = model(images).sum()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        activations = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
        loss.backward()
    model.zero_grad()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, counter.get_total_flops() // 2, activations // 2)


def _same(tensor: Any) -> Any:
    return tensor
