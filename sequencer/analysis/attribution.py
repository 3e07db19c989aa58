"""Exact decompositions of a logit: by the tokens at the end of a model, and by the scan directions of its blocks.

Both are identities of the architecture, not estimates. The final layer norm, the mean over tokens and the linear head
give

    logit_k = mean over t of (W_k . LN(x_t)) + b_k,

a class activation map (Zhou et al. 2016, arXiv 1512.04150) that sums to the logit. The residual stream x_t is the sum
of the stem, the outputs of all token mixers, each of which is linear in its stacked directions, and the outputs of all
MLPs. With the standard deviation of the final layer norm held for each token, the logit is linear in x_t, so that it is
the sum of what these parts contribute.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `K` classes, `P` parts, `D` hidden size.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sequencer.layers import RNN, RNN1d, RNN2d
from sequencer.models import Sequencer
from sequencer.ops import rnn2d

DIRECTIONS = ("down", "up", "right", "left", "forward", "backward")  # the last two are those of `VSequencer`


class Part(NamedTuple):
    """A term of the residual stream: where it is added, and what computes it."""

    stage: int | None  # counted from 0, as in the names of modules; None for the stem and the head
    block: int | None  # within the stage; None for the bias of a downsampling
    source: str  # a direction, `mixer bias`, `mlp`, `downsampling bias`, `stem`, or `norm and head bias`


class Contributions(NamedTuple):
    """What each part contributes to each logit; the sum over the parts is the logit."""

    parts: list[Part]
    values: Float[Tensor, "B P K"]


def check_decomposable(model: nn.Module) -> Sequencer:
    """Checks that the logits of a model are the mean of a linear function of its normalised tokens.

    Raises:
        ValueError: The model is not a `Sequencer`, is in training mode, does not average its tokens, or has no classes.
    """
    if not isinstance(model, Sequencer):
        raise ValueError(f"evidence and directions are defined for Sequencer models, not for {type(model).__name__}")
    if model.training:
        raise ValueError("the model is in training mode; call eval() first")
    if model.global_pool != "avg":
        raise ValueError(f"evidence and directions need average pooling, and global_pool is {model.global_pool!r}")
    if model.num_classes == 0:
        raise ValueError("the model has no classes: it returns features")
    return model


@torch.no_grad()
def evidence_maps(model: nn.Module, images: Float[Tensor, "B C0 H0 W0"]) -> Float[Tensor, "B K H W"]:
    """Computes the share of each token in each logit.

    The sum over the tokens and the bias of the head, `model.get_classifier().bias`, is the logit. Tokens are mixed by
    then: a map shows where the evidence lies, not what was looked at.

    Args:
        model: A `Sequencer` in eval mode with average pooling.
        images: Normalised images, on the device and of the dtype of the model.

    Raises:
        ValueError: As `check_decomposable`.
    """
    model = check_decomposable(model)
    tokens = model.forward_features(images)
    return (tokens @ model.head.fc.weight.T).permute(0, 3, 1, 2) / (tokens.shape[1] * tokens.shape[2])


@torch.no_grad()
def split_update(mixer: RNN2d | RNN1d, x: Float[Tensor, "B H W C"]) -> dict[str, Float[Tensor, "B H W C"]]:
    """Splits the output of a token mixer into the parts of its scan directions and of its bias.

    Directions of an `RNN2d` are `down`, `up`, `right`, `left`; of an `RNN1d`, `forward`, `backward`. With several
    recurrent layers they are those of the last one. The sum of the parts is `mixer(x)`.

    Args:
        mixer: The token mixer, in eval mode.
        x: Its input, a token map.
    """
    fc = mixer.fc if isinstance(mixer, RNN2d) else None
    linear = fc if isinstance(fc, nn.Linear) else None
    weight = linear.weight if linear is not None else torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    parts = {}
    for rnn, names, start, y in scans(mixer, x):
        for i, (name, output) in enumerate(zip(names, y.split(rnn.hidden_size, dim=-1), strict=False)):
            first = start + i * rnn.hidden_size
            parts[name] = F.linear(output, weight[:, first : first + rnn.hidden_size])
    if linear is not None and linear.bias is not None:
        parts["mixer bias"] = linear.bias.expand_as(x)
    return parts


def axes(mixer: RNN2d | RNN1d) -> list[tuple[RNN, tuple[str, str]]]:
    """Returns the recurrence of each axis of a token mixer, with the names of its directions, of which it may lack one.

    The second direction runs against the order of the tokens.
    """
    if isinstance(mixer, RNN1d):
        return [(mixer.rnn, ("forward", "backward"))]
    found = ((mixer.rnn_v, ("down", "up")), (mixer.rnn_h, ("right", "left")))
    return [(rnn, names) for rnn, names in found if rnn is not None]


def scans(mixer: RNN2d | RNN1d, x: Float[Tensor, "B H W C"]) -> list[tuple[RNN, tuple[str, str], int, Tensor]]:
    """Runs each axis of a token mixer without its closing linear layer.

    Returns:
        For each axis its recurrence, the names of the directions that it may have, the channel at which its outputs
        stand in the union, and these outputs, `B H W K`, with `hidden_size` channels for each direction.
    """
    found: list[tuple[RNN, tuple[str, str], int, Tensor]] = []
    first = 0
    for rnn, names in axes(mixer):
        if isinstance(mixer, RNN1d):
            y = rnn(x.flatten(1, 2)).reshape(*x.shape[:3], -1)
        else:
            vertical, horizontal = (rnn.weights() if rnn is axis else None for axis in (mixer.rnn_v, mixer.rnn_h))
            y = rnn2d(x, vertical, horizontal, mixer.cell)
        found.append((rnn, names, first, y))
        first += rnn.output_size if isinstance(mixer, RNN2d) and mixer.union == "cat" else 0
    return found


@torch.no_grad()
def contributions(model: nn.Module, images: Float[Tensor, "B C0 H0 W0"]) -> Contributions:
    """Splits each logit into what the stem, the directions, biases and MLPs of all blocks, and the head contribute.

    A part is carried through the downsamplings after it, which are linear, and through the final layer norm with the
    standard deviation of each token held. The sum of the parts is the logit. Memory grows with the number of blocks:
    one token map for each part.

    Args:
        model: A `Sequencer` in eval mode with average pooling.
        images: Normalised images, on the device and of the dtype of the model.

    Raises:
        ValueError: As `check_decomposable`.
    """
    model = check_decomposable(model)
    children: Any = model  # torch types the children of a module as tensors or modules
    fc, norm, stages = children.head.fc, children.norm, children.stages
    x = model.forward_embed(images)
    stream = {Part(None, None, "stem"): x}
    for number, stage in enumerate(stages):
        if not isinstance(stage.downsample, nn.Identity):
            stream = _carry(stream, stage.downsample.down)
            x = stage.downsample(x)
            stream[Part(number, None, "downsampling bias")] = stage.downsample.down.bias.expand_as(x)
        for index, block in enumerate(stage.blocks):
            update = split_update(block.rnn_tokens, block.norm1(x))
            stream |= {Part(number, index, source): part for source, part in update.items()}
            x = x + sum(update.values())
            change = block.mlp_channels(block.norm2(x))
            stream[Part(number, index, "mlp")] = change
            x = x + change
    deviation = (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()
    gain = fc.weight * norm.weight
    values = [
        ((part - part.mean(dim=-1, keepdim=True)) / deviation).mean(dim=(1, 2)) @ gain.T for part in stream.values()
    ]
    values.append((fc.weight @ norm.bias + fc.bias).expand_as(values[0]))
    return Contributions([*stream, Part(None, None, "norm and head bias")], torch.stack(values, dim=1))


def _carry(stream: dict[Part, Tensor], convolution: nn.Conv2d) -> dict[Part, Tensor]:
    """Applies a downsampling convolution without its bias to token maps."""
    return {
        part: F.conv2d(x.permute(0, 3, 1, 2), convolution.weight, stride=convolution.stride).permute(0, 2, 3, 1)
        for part, x in stream.items()
    }


def sum_by_source(parts: Iterable[Part], values: Iterable[Any]) -> dict[str, Any]:
    """Sums contributions over the blocks; one entry for each source, such as `down` or `mlp`, in order of appearance.

    Args:
        parts: As in `Contributions`.
        values: For each part a number or a tensor.
    """
    sums: dict[str, Any] = {}
    for part, value in zip(parts, values, strict=True):
        sums[part.source] = sums[part.source] + value if part.source in sums else value
    return sums


@torch.inference_mode()
def removal_curves(
    model: nn.Module,
    images: Float[Tensor, "B C0 H0 W0"],
    maps: Float[Tensor, "B H W"],
    classes: Tensor,
    steps: int = 16,
) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S"]]:
    """Computes the deletion and insertion curves of maps (Petsiuk et al. 2018, arXiv 1806.07421).

    Image regions are replaced by the mean colour, zero after normalisation, in the order of the map, the largest values
    first; insertion starts from the mean colour and restores them in that order. A good map has a low mean of the
    deletion curve and a high mean of the insertion curve.

    Args:
        model: A classifier in eval mode.
        images: Normalised images, on the device and of the dtype of the model.
        maps: Values that order the regions of each image, which are the cells of the map.
        classes: The class of each image whose probability is followed, `B`.
        steps: Number of steps from the whole image to none of it.

    Returns:
        Probabilities in the course of deletion and of insertion, `S = steps + 1` values each.
    """
    rank = maps.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).reshape(maps.shape)
    share = (rank + 1) / maps[0].numel()  # the largest value is the first to be removed
    share = F.interpolate(share[:, None].to(images.dtype), size=images.shape[-2:], mode="nearest")
    curves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in range(steps + 1):
        removed = share <= step / steps + 1e-6
        for curve, kept in zip(curves, (~removed, removed), strict=True):
            probabilities = model(images * kept).softmax(dim=1)
            curve.append(probabilities.gather(1, classes[:, None])[:, 0])
    return torch.stack(curves[0], dim=1), torch.stack(curves[1], dim=1)
