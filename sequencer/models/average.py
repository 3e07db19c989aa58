"""Averaging of models: the uniform soup of Wortsman et al. 2022 (Model soups), section 3."""

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sequencer.models.checkpoint import CheckpointError
from sequencer.models.load import PREPROCESSING, LoadedModel


def average_models(models: Iterable[tuple[str, LoadedModel]]) -> LoadedModel:
    """Averages the weights of models of equal architecture, classes, preprocessing and slot.

    Means are computed in float64. Non-float tensors are taken from the first model.

    Args:
        models: Pairs of source and model, two or more. If this is a generator, two models are in memory at a time.

    Returns:
        The first model, whose weights are replaced by the means. Its `about` lists the sources and has no results.

    Raises:
        CheckpointError: There are fewer than two models, one of them differs in kind from the first, or a weight is not
            finite.
    """
    models = iter(models)
    first_source, first = next(models)
    probe = copy.deepcopy(first.model)
    sums: dict[str, Tensor] = {name: tensor.double() for name, tensor in first.model.state_dict().items()}
    sources = [first_source]
    _check_finite(first_source, first)
    for source, other in models:
        _check_finite(source, other)
        if difference := _difference(first, other, probe):
            raise CheckpointError(f"{source} cannot be averaged with {first_source}: {difference}")
        for name, tensor in other.model.state_dict().items():
            sums[name] += tensor
        sources.append(source)
    if len(sources) < 2:
        raise CheckpointError("an average needs two models or more")
    with torch.no_grad():
        for name, tensor in first.model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(sums[name] / len(sources))
    about = {key: value for key, value in first.about.items() if key not in ("metrics", "figures", "images")}
    return replace(first, about=about | {"averaged": sources})


def _check_finite(source: str, loaded: LoadedModel) -> None:
    """Checks the weights of a model, which those of a diverged run do not pass.

    Raises:
        CheckpointError: A weight is NaN or infinite.
    """
    for name, tensor in loaded.model.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{source} cannot be averaged: {name} has values that are not finite")


@torch.inference_mode()
def _difference(first: LoadedModel, other: LoadedModel, probe: nn.Module) -> str | None:
    """Returns how two models differ in kind, or None.

    Args:
        first: The first model.
        other: The model that is compared with it.
        probe: A copy of the first model, whose weights are overwritten.
    """
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
    # outputs are compared instead of arguments, since some arguments matter in training only
    return None if torch.equal(probe(x), other.model(x)) else "with equal weights they compute different outputs"
