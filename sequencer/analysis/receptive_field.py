"""Effective receptive fields of single tokens, by the gradient with respect to the image (Luo et al. 2016)."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sequencer.models import Sequencer

CHUNK = 64  # tokens in a backward pass


def token_fields(
    model: Sequencer, images: Float[Tensor, "B C H W"], stage: int, most: int = 8
) -> Float[np.ndarray, "R S H W"]:
    """Computes the effective receptive fields of the tokens of a stage, on a grid of at most `most` x `most` tokens.

    The procedure is that of the paper's code (`generate_erf.py` of okojoalg/sequencer), for every token in place of the
    centre: the channels of the token are summed, and the positive part of the gradient with respect to the image is
    summed over channels and averaged over images. One backward pass serves many tokens, each with a copy of the image.

    Args:
        model: In eval mode.
        images: Normalised images, on the device of the model.
        stage: Index of the stage.
        most: Rows and columns of the grid; tokens between its points are left out.

    Returns:
        For the token in row r and column s of the grid, a map of the size of the images.
    """
    with torch.no_grad():
        height, width = _tokens(model, images[:1], stage).shape[1:3]
    rows, columns = (np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)) for n in (height, width))
    places = [(r, c) for r in rows for c in columns]
    total = torch.zeros(len(places), *images.shape[-2:], dtype=torch.float64)
    for image in images:
        for start in range(0, len(places), CHUNK):
            chosen = places[start : start + CHUNK]
            copies = image.detach().expand(len(chosen), -1, -1, -1).clone().requires_grad_()
            with torch.enable_grad():
                tokens = _tokens(model, copies, stage)
                value = torch.stack([tokens[number, r, c].sum() for number, (r, c) in enumerate(chosen)]).sum()
            (gradient,) = torch.autograd.grad(value, copies)
            total[start : start + CHUNK] += gradient.relu().sum(dim=1).double().cpu()
    return (total / len(images)).reshape(len(rows), len(columns), *images.shape[-2:]).numpy()


def _tokens(model: Sequencer, images: Tensor, stage: int) -> Tensor:
    x = model.forward_embed(images)
    for k in range(stage + 1):
        x = model.stages[k](x)
    return x
