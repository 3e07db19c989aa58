"""Accuracy without single scan directions, each replaced by its mean.

The output of a direction of a block, before the closing linear layer of its token mixer, is replaced by its mean over
images at each position. What is left of the direction is what does not depend on the image. The means are those of the
images that the accuracy is computed on, without their labels.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `D` hidden size, `K` classes.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sequencer.analysis.attribution import scans
from sequencer.analysis.changes import Change, ChangeCounts
from sequencer.analysis.statistics import Interval
from sequencer.evaluation import is_right
from sequencer.layers import RNN1d, RNN2d
from sequencer.models import Sequencer

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]
Means = dict["Place", Float[Tensor, "H W D"]]


class Place(NamedTuple):
    """A scan direction of a block."""

    stage: int  # counted from 0, as in the names of modules
    block: int  # within the stage
    direction: str  # one of `sequencer.analysis.attribution.DIRECTIONS`


class KnockOuts(NamedTuple):
    """The accuracy of a model, and its change without each direction of each block."""

    clean: Interval
    images: int
    changes: dict[Place, Change]


def check_scanning(model: nn.Module) -> Sequencer:
    """Checks that a model classifies, and that its blocks mix tokens by scan directions.

    Raises:
        ValueError: The model is not a `Sequencer`, has token mixers of another kind, is in training mode, or has no
            classes.
    """
    if not isinstance(model, Sequencer):
        raise ValueError(f"knock-out is defined for Sequencer models, not for {type(model).__name__}")
    for _, _, block in _blocks(model):
        if not isinstance(block.rnn_tokens, RNN2d | RNN1d):
            raise ValueError(f"knock-out needs scan directions, and {type(block.rnn_tokens).__name__} has none")
    if model.training:
        raise ValueError("the model is in training mode; call eval() first")
    if model.num_classes == 0:
        raise ValueError("the model has no classes: it returns features")
    return model


def knock_out(model: nn.Module, batches: Batches) -> KnockOuts:
    """Measures the accuracy without each direction of each block.

    The images are read twice: for the means, and for the predictions. The activations before a block are computed once
    for a batch, and each of its directions continues from them. Memory does not grow with the number of images.

    Args:
        model: A `Sequencer` in eval mode.
        batches: Normalised images `B C H W` of one size and labels `B`, on the device of the model, and indices of the
            images; each iteration yields the same ones.

    Raises:
        ValueError: As `check_scanning`.
    """
    model = check_scanning(model)
    means = direction_means(model, (images for images, *_ in batches))
    counts = ChangeCounts(len(means))
    with torch.inference_mode():
        for images, labels, _ in batches:
            *found, clean = [is_right(logits, labels) for _, logits in knocked_out_logits(model, images, means)]
            counts.add(clean, torch.stack(found))
    return KnockOuts(counts.clean(), counts.images, dict(zip(means, counts.changes(), strict=True)))


@torch.inference_mode()
def direction_means(model: Sequencer, batches: Iterable[Float[Tensor, "B C0 H0 W0"]]) -> Means:
    """Computes the mean over images of the output of each direction of each block, at each position."""
    sums: dict[Place, Tensor] = {}
    number = 0
    for images in batches:
        number += len(images)
        for place, _, _, outputs in _scanned(model, images):
            for name, output in outputs.items():
                total = output.double().sum(dim=0)
                key = Place(*place, name)
                sums[key] = sums[key] + total if key in sums else total
    dtype = next(model.parameters()).dtype
    return {place: (total / number).to(dtype) for place, total in sums.items()}


@torch.inference_mode()
def knocked_out_logits(
    model: Sequencer, images: Float[Tensor, "B C0 H0 W0"], means: Means
) -> Iterator[tuple[Place | None, Float[Tensor, "B K"]]]:
    """Yields the logits without each direction, in the order of `means`; last, with None, those of the whole model.

    Args:
        model: A `Sequencer` in eval mode.
        images: Normalised images.
        means: As `direction_means` returns them.
    """
    for place, block, x, outputs in _scanned(model, images):
        for name, output in outputs.items():
            key = Place(*place, name)
            update = _join(block.rnn_tokens, outputs | {name: means[key].expand_as(output)})
            yield key, _continue(model, *place, x + update)
    yield None, _continue(model, *place, x + _join(block.rnn_tokens, outputs))


def _blocks(model: Sequencer) -> Iterator[tuple[int, int, Any]]:
    stages: Any = model.stages  # torch types the children of a module as tensors or modules
    for number, stage in enumerate(stages):
        for index, block in enumerate(stage.blocks):
            yield number, index, block


def _scanned(
    model: Sequencer, images: Float[Tensor, "B C0 H0 W0"]
) -> Iterator[tuple[tuple[int, int], Any, Tensor, dict[str, Tensor]]]:
    """Yields the stage and index of each block, the block, its input, and the outputs of its directions."""
    stages: Any = model.stages
    x = model.forward_embed(images)
    for number, index, block in _blocks(model):
        if index == 0:
            x = stages[number].downsample(x).contiguous()
        outputs = _outputs(block.rnn_tokens, block.norm1(x))
        yield (number, index), block, x, outputs
        x = _mix_channels(block, x + _join(block.rnn_tokens, outputs))


def _outputs(mixer: RNN2d | RNN1d, x: Float[Tensor, "B H W C"]) -> dict[str, Float[Tensor, "B H W D"]]:
    """Runs the directions of a token mixer, without its closing linear layer."""
    found: dict[str, Tensor] = {}
    for rnn, names, _, y in scans(mixer, x):
        found |= dict(zip(names, y.split(rnn.hidden_size, dim=-1), strict=False))
    return found


def _join(mixer: RNN2d | RNN1d, outputs: dict[str, Float[Tensor, "B H W D"]]) -> Float[Tensor, "B H W C"]:
    """Computes the output of a token mixer from those of its directions."""
    parts = list(outputs.values())
    if isinstance(mixer, RNN1d):
        return torch.cat(parts, dim=-1)
    if mixer.union == "add":
        half = len(parts) // 2
        return mixer.fc(torch.cat(parts[:half], dim=-1) + torch.cat(parts[half:], dim=-1))
    return mixer.fc(torch.cat(parts, dim=-1))


def _continue(model: Sequencer, stage: int, index: int, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B K"]:
    """Computes the logits from the tokens after the token mixer of a block."""
    stages: Any = model.stages
    blocks = stages[stage].blocks
    x = _mix_channels(blocks[index], x)
    for module in (*blocks[index + 1 :], *stages[stage + 1 :]):
        x = module(x)
    return model.forward_head(model.norm(x))


def _mix_channels(block: Any, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
    """Computes the output of a block from the tokens after its token mixer."""
    return x + block.mlp_channels(block.norm2(x))
