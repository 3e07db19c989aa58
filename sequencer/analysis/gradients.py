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

    The parameters of the model are frozen meanwhile, which saves their part of the backward pass.

    Args:
        model: In eval mode.
        images: The images; they get no gradient themselves.
        scalars: Computes the scalars from a copy of the images, by the model.
    """
    leaf = images.detach().clone().requires_grad_()
    # cuDNN has no backward pass of recurrent layers in eval mode
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False), _frozen(model):
        values = scalars(leaf)
        return [
            torch.autograd.grad(value, leaf, retain_graph=number < len(values))[0]
            for number, value in enumerate(values, start=1)
        ]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Switches off the gradients of the parameters that have some."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
