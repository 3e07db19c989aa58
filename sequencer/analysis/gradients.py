"""Gradients with respect to images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn


def image_gradients(
    model: nn.Module, images: Float[Tensor, "B C H W"], scalars: Callable[[Tensor], list[Tensor]]
) -> list[Float[Tensor, "B C H W"]]:
    """Computes the gradient of each of several scalars with respect to images.

    Args:
        model: In eval mode.
        images: The images; they get no gradient themselves.
        scalars: Computes the scalars from a copy of the images, by the model.
    """
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad(), for_image_gradients(model):
        values = scalars(leaf)
        return [
            torch.autograd.grad(value, leaf, retain_graph=number < len(values))[0]
            for number, value in enumerate(values, start=1)
        ]


@contextmanager
def for_image_gradients(model: nn.Module) -> Iterator[None]:
    """Prepares a model in eval mode for gradients with respect to its images, inside the block.

    Its parameters are frozen, which saves their part of the backward pass, and cuDNN, which has no backward pass of
    recurrent layers in eval mode, is not used.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
