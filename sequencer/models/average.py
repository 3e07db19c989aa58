"""One model of several: the uniform soup of Wortsman et al. 2022 (Model soups), section 3."""

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sequencer.models.checkpoint import CheckpointError
from sequencer.models.load import PREPROCESSING, LoadedModel


def average_models(models: Iterable[tuple[str, LoadedModel]]) -> LoadedModel:
    """The mean of the weights of models of one kind, taken in float64; what is no floating-point number is the first's.

    Args:
        models: two or more, each with where it is from; one at a time is held.

    Returns:
        The first with the means as its weights; its `about` says what was averaged, and no metrics.

    Raises:
        CheckpointError: fewer than two, or one is of another kind than the first.
    """
    models = iter(models)
    first_source, first = next(models)
    probe = copy.deepcopy(first.model)
    sums: dict[str, Tensor] = {name: tensor.double() for name, tensor in first.model.state_dict().items()}
    sources = [first_source]
    for source, other in models:
        if difference := _difference(first, other, probe):
            raise CheckpointError(f"{source} cannot be averaged with {first_source}: {difference}")
        for name, tensor in other.model.state_dict().items():
            sums[name] += tensor
        sources.append(source)
    if len(sources) < 2:
        raise CheckpointError("an average is of two models or more")
    with torch.no_grad():
        for name, tensor in first.model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(sums[name] / len(sources))
    about = {key: value for key, value in first.about.items() if key != "metrics"}
    return replace(first, about=about | {"averaged": sources})


@torch.inference_mode()
def _difference(first: LoadedModel, other: LoadedModel, probe: nn.Module) -> str | None:
    """In what the models are of different kinds; `probe` is a copy of the first, which takes the other's weights."""
    kinds = [
        {
            "architectures": one.arch,
            "slots": one.slot,
            "classes": one.class_names or one.model.num_classes,
            "preprocessing": [one.pretrained_cfg[key] for key in PREPROCESSING],
        }
        for one in (first, other)
    ]
    for what, expected in kinds[0].items():
        if (found := kinds[1][what]) != expected:
            return f"they have different {what}, {found} and {expected}"
    x = torch.randn(1, *first.pretrained_cfg["input_size"])
    try:
        probe.load_state_dict(other.model.state_dict())
    except RuntimeError:
        return "their weights have different names or shapes"
    # arguments may differ that matter in training alone
    return None if torch.equal(probe(x), other.model(x)) else "they do other things with the same weights"
