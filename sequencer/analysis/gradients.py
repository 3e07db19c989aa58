"""Gradients with respect to images."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def image_gradients(
    images: Float[Tensor, "B C H W"], scalars: Callable[[Tensor], list[Tensor]]
) -> list[Float[Tensor, "B C H W"]]:
    """Computes the gradient of each of several scalars with respect to images.

    Args:
        images: The images; they get no gradient themselves.
        scalars: Computes the scalars from a copy of the images, by a model in eval mode.
    """
    leaf = images.detach().clone().requires_grad_()
    # cuDNN has no backward pass of recurrent layers in eval mode
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        values = scalars(leaf)
        return [
            torch.autograd.grad(value, leaf, retain_graph=number < len(values))[0]
            for number, value in enumerate(values, start=1)
        ]
