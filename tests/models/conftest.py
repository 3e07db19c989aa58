"""A model folder, and random weights for models, whose heads are initialised to zero: all logits would be equal."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import DIGITS, save_run


def randomise(model: nn.Module) -> nn.Module:
    """Draws all parameters at random, at scales that keep activations and logits near 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model


@pytest.fixture(name="randomise")
def _randomise():
    torch.manual_seed(0)
    return randomise


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder."""
    return save_run(tmp_path / "run", DIGITS, list("0123456789")) / "model"
